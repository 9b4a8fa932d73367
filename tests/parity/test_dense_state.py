"""Of the dense models, too: chunks, batch mates, hand-off and padding change nothing.

A full layer's blocks and a sliding layer's ring are read across every border.
"""

from pathlib import Path

import pytest
import torch

from scission.common.cache.layout import Kind
from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.model.batch import SequenceChunk, Snapshot, build_batch
from scission.common.model.load import LoadedModel
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.one_process import CPU, OneProcess, load_exact
from tests.parity.state_rows import assert_close, everything, hand_over, poison

CONFIGS = {
    "qwen3": qwen3_config(num_hidden_layers=2),
    "ministral3": ministral3_config(num_hidden_layers=2),
    "ministral3-sliding": ministral3_config(num_hidden_layers=2, sliding_window=40),
    "step3p5": step3p5_config(),
}


@pytest.fixture(scope="module", params=CONFIGS)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(directory, CONFIGS[request.param], seed=2)
    return load_exact(directory)


@pytest.mark.parametrize(
    "sizes",
    [[1] * 200, [40] * 7 + [20], [128, 128, 44], [3, 1, 36, 2, 215, 43], [5, 290, 5], [131, 169]],
    ids=["single", "window", "block", "boundaries", "long", "odd"],
)
def test_any_chunking_equals_one_shot(exact: LoadedModel, sizes: list[int]) -> None:
    prompt = _tokens(sum(sizes))
    runner = OneProcess(exact, max_seqs=2)
    whole, chunked = runner.new_sequence(), runner.new_sequence()
    expected = runner.step([(whole, prompt)], logits="all")
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [
        runner.step([(chunked, prompt[end - size : end])], logits="all")
        for size, end in zip(sizes, ends, strict=True)
    ]
    assert_close(torch.cat(parts), expected)


def test_sequences_of_one_batch_do_not_see_each_other(exact: LoadedModel) -> None:
    prompts = [_tokens(n) for n in (7, 140, 1, 33, 128, 260)]
    alone_runner, together_runner = (OneProcess(exact, max_seqs=6) for _ in range(2))
    alone = [alone_runner.new_sequence() for _ in prompts]
    together = [together_runner.new_sequence() for _ in prompts]
    expected = [alone_runner.step([(s, p)]) for s, p in zip(alone, prompts, strict=True)]
    logits = together_runner.step(list(zip(together, prompts, strict=True)))
    assert_close(logits, torch.cat(expected))
    # a mix of single tokens and chunks, then single tokens, in another order
    for lengths in ((1, 5, 1, 130, 1, 2), (1,) * 6):
        fed = [_tokens(n) for n in lengths]
        expected = [alone_runner.step([(s, t)]) for s, t in zip(alone, fed, strict=True)]
        logits = together_runner.step(list(zip(together, fed, strict=True))[::-1])
        assert_close(logits.flip(0), torch.cat(expected))


@pytest.mark.parametrize("length", [1, 38, 39, 40, 41, 127, 128, 129, 257])
def test_live_rows_alone_continue_bit_for_bit(exact: LoadedModel, length: int) -> None:
    prefill, decode = OneProcess(exact, max_seqs=2), OneProcess(exact, max_seqs=2)
    poison(decode.storage)
    # other blocks and another slot than the sender's
    decode.new_sequence()
    source, target = prefill.new_sequence(), decode.new_sequence()
    logits = prefill.prefill(source, _tokens(length), chunk_size=max(1, length * 2 // 3))
    hand_over(prefill, source, decode, target)
    theirs = decode.greedy([target], logits, 50)
    assert not theirs.isnan().any()
    assert torch.equal(prefill.greedy([source], logits, 50), theirs)


def test_chunks_after_a_hand_over_read_live_rows_only(exact: LoadedModel) -> None:
    """A new attempt feeds the forced tokens as one chunk."""
    prefill, decode = OneProcess(exact, max_seqs=1), OneProcess(exact, max_seqs=1)
    poison(decode.storage)
    source, target = prefill.new_sequence(), decode.new_sequence()
    prefill.step([(source, _tokens(261))])
    hand_over(prefill, source, decode, target)
    forced = _tokens(150)
    ours, theirs = (
        runner.step([(sequence, forced)], logits="all")
        for runner, sequence in ((prefill, source), (decode, target))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [1, 6], ids=["single tokens", "chunks"])
@torch.inference_mode()
def test_padding_changes_nothing_even_where_scratch_holds_no_numbers(
    exact: LoadedModel, length: int
) -> None:
    results, states = [], []
    for num_padding in (0, 3):
        torch.manual_seed(1)
        runner = OneProcess(exact, max_seqs=2)
        poison(runner.storage)
        sequences = [runner.new_sequence(), runner.new_sequence()]
        runner.step([(sequences[0], _tokens(130)), (sequences[1], _tokens(3))])
        chunks = [
            SequenceChunk(_tokens(length), start, s.block_ids, s.slot)
            for s, start in zip(sequences, (130, 3), strict=True)
        ]
        padding = SequenceChunk([0], start=-1, block_ids=[0], slot=0, logits="none")
        batch = build_batch([*chunks, *[padding] * num_padding], CPU)
        results.append(exact.model.forward(batch, runner.storage))
        states.append([tensor.nan_to_num() for tensor in everything(runner.storage)])
    assert not results[1].isnan().any()
    assert_close(results[1], results[0])
    for padded, plain in zip(states[1], states[0], strict=True):
        assert_close(padded, plain)


@pytest.mark.parametrize("end", [128, 256])
def test_snapshot_holds_the_state_at_its_end(exact: LoadedModel, end: int) -> None:
    """A prefix hit continues from the snapshot's slot and the shared blocks."""
    prompt = _tokens(300)
    runner = OneProcess(exact, max_seqs=3)
    sequence, snapshot, resumed = (runner.new_sequence() for _ in range(3))
    with torch.inference_mode():
        # the first chunk ends before the snapshot, the second far behind it
        for start, stop in ((0, 50), (50, 300)):
            runner.storage.copy_slot(sequence.slot, snapshot.slot)
            chunk = SequenceChunk(
                prompt[start:stop],
                start,
                sequence.block_ids,
                sequence.slot,
                snapshots=(Snapshot(snapshot.slot, end),) if start else (),
            )
            expected = exact.model.forward(build_batch([chunk], CPU), runner.storage)
    num_shared = end // exact.layout.block_size
    runner.storage.copy_slot(snapshot.slot, resumed.slot)
    resumed.block_ids[:num_shared] = sequence.block_ids[:num_shared]
    resumed.token_ids = prompt[:end]
    assert_close(runner.step([(resumed, prompt[end:])]), expected)


def test_sliding_layers_ship_the_window_less_one(exact: LoadedModel) -> None:
    rows = {c.name: c.shipped_rows(261) for c in exact.layout.components}
    for component in exact.layout.components:
        if component.kind is Kind.RING:
            assert component.name.startswith("sliding_")
            assert rows[component.name] == (261 - 39, 261)
        else:
            assert component.name.startswith("full_") and rows[component.name] == (0, 261)


def _tokens(count: int) -> list[int]:
    return torch.randint(0, 320, (count,)).tolist()
