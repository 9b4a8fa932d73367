import pytest
from hypothesis import given
from hypothesis import strategies as st

from scission.protos import inference_pb2
from scission.services.gateway.timeline import Timeline

seconds = st.floats(0, 100)


@given(st.lists(seconds, min_size=7, max_size=7), st.floats(-1e6, 1e6), st.floats(-0.01, 0.01))
def test_parts_sum_to_the_whole_whatever_the_clocks_say(
    parts: list[float], offset: float, error: float
) -> None:
    prepare, queue, out, waiting, compute, sample, back = parts
    timeline = Timeline(arrived_at=0.0, generate_at=prepare)
    timeline.begin_prefill(0, prepare + queue)
    assert timeline.parts() is None
    received = timeline.called_at + out
    sent = received + waiting + compute + sample
    timeline.received_at = received + offset
    timeline.clock_offset_s = offset + error
    timeline.prefilled = inference_pb2.Prefilled(
        queue_s=waiting, compute_s=compute, sample_s=sample
    )
    timeline.token_sent_at = sent + offset
    timeline.first_token_at = sent + back
    found = timeline.parts()
    assert found is not None
    assert sum(found.values()) == pytest.approx(timeline.first_token_at, abs=1e-6)


def test_a_later_attempt_leaves_the_first_tokens_parts_alone() -> None:
    timeline = Timeline(0.0, 1.0)
    timeline.begin_prefill(0, 2.0)
    timeline.begin_prefill(1, 3.0)
    assert (timeline.attempt, timeline.called_at) == (1, 3.0)
    timeline.first_token_at = 4.0
    timeline.begin_prefill(2, 5.0)
    assert (timeline.attempt, timeline.called_at) == (1, 3.0)
