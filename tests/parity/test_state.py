"""Chunks, batch mates, hand-off and padding change nothing: the state is what it claims to be."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scission.common.cache.layout import Component, Kind
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.model.batch import SequenceChunk, Snapshot, build_batch
from scission.common.model.load import LoadedModel
from scission.kernels.quant import round_trip_fp4, round_trip_fp8
from tests.one_process import CPU, OneProcess, OneSequence, load_deployed, load_exact
from tests.parity.state_rows import assert_close, everything, hand_over, poison
from tests.reference_checkpoint import tiny_config

# around every boundary: ratio 4, the window of 16, ratio 128, and twice that
LENGTHS = (1, 3, 4, 5, 15, 16, 17, 127, 128, 129, 255, 256, 257)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=2)
    return directory


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> LoadedModel:
    return load_exact(checkpoint)


@pytest.fixture(scope="module")
def deployed(checkpoint: Path) -> LoadedModel:
    return load_deployed(checkpoint)


@pytest.mark.parametrize(
    "sizes",
    [[1] * 300, [16] * 18 + [12], [128, 128, 44], [3, 1, 125, 2, 126, 43], [5, 290, 5], [131, 169]],
    ids=["single", "window", "block", "boundaries", "long", "odd"],
)
def test_any_chunking_equals_one_shot(exact: LoadedModel, sizes: list[int]) -> None:
    prompt = _tokens(300)
    runner = OneProcess(exact, max_seqs=2)
    whole, chunked = runner.new_sequence(), runner.new_sequence()
    expected = runner.step([(whole, prompt)], logits="all")
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [
        runner.step([(chunked, prompt[end - size : end])], logits="all")
        for size, end in zip(sizes, ends, strict=True)
    ]
    assert_close(torch.cat(parts), expected)
    for component in exact.layout.components:
        assert_close(_live(runner, component, chunked), _live(runner, component, whole))


def test_sequences_of_one_batch_do_not_see_each_other(exact: LoadedModel) -> None:
    prompts = [_tokens(n) for n in (7, 140, 1, 33, 128, 260)]
    alone_runner = OneProcess(exact, max_seqs=6)
    together_runner = OneProcess(exact, max_seqs=6)
    alone = [alone_runner.new_sequence() for _ in prompts]
    together = [together_runner.new_sequence() for _ in prompts]

    expected = [alone_runner.step([(s, p)]) for s, p in zip(alone, prompts, strict=True)]
    logits = together_runner.step(list(zip(together, prompts, strict=True)))
    assert_close(logits, torch.cat(expected))

    # a mix of single tokens and chunks, then single tokens, in another order
    for lengths in ((1, 5, 1, 130, 1, 2), (1,) * 6):
        fed = [_tokens(n) for n in lengths]
        expected = [alone_runner.step([(s, t)]) for s, t in zip(alone, fed, strict=True)]
        reordered = list(zip(together, fed, strict=True))[::-1]
        logits = together_runner.step(reordered)
        assert_close(logits.flip(0), torch.cat(expected))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("numerics", ["exact", "deployed"])
def test_live_rows_alone_continue_bit_for_bit(
    request: pytest.FixtureRequest, numerics: str, length: int
) -> None:
    loaded: LoadedModel = request.getfixturevalue(numerics)
    prefill, decode = OneProcess(loaded, max_seqs=2), OneProcess(loaded, max_seqs=2)
    poison(decode.storage)
    # other blocks and another slot than the sender's
    decode.new_sequence()
    source, target = prefill.new_sequence(), decode.new_sequence()
    prompt = _tokens(length)
    logits = prefill.prefill(source, prompt, chunk_size=max(1, length * 2 // 3))
    hand_over(prefill, source, decode, target)

    num_tokens = 135 if length in (1, 127, 129) else 20
    theirs = decode.greedy([target], logits, num_tokens)
    ours = prefill.greedy([source], logits, num_tokens)
    assert not theirs.isnan().any()
    assert torch.equal(ours, theirs)


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


def test_a_recycled_slot_shows_nothing_of_its_last_user(exact: LoadedModel) -> None:
    runner = OneProcess(exact, max_seqs=1)
    used = runner.new_sequence()
    runner.step([(used, _tokens(200))])
    runner.storage.reset_slot(used.slot)
    again = OneSequence(used.block_ids, used.slot)
    clean = OneProcess(exact, max_seqs=1)
    prompt = _tokens(9)
    expected = clean.step([(clean.new_sequence(), prompt)], logits="all")
    assert torch.equal(runner.step([(again, prompt)], logits="all"), expected)


@pytest.mark.parametrize("length", [1, 6], ids=["single tokens", "chunks"])
def test_padding_changes_nothing(exact: LoadedModel, length: int) -> None:
    results, states = [], []
    for num_padding in (0, 3):
        runner = OneProcess(exact, max_seqs=2)
        sequences = [runner.new_sequence(), runner.new_sequence()]
        runner.step([(sequences[0], _ramp(130)), (sequences[1], _ramp(3))])
        chunks = [
            SequenceChunk(_ramp(length), start, s.block_ids, s.slot)
            for s, start in zip(sequences, (130, 3), strict=True)
        ]
        padding = SequenceChunk([0], start=-1, block_ids=[0], slot=0, logits="none")
        before = everything(runner.storage)
        results.append(
            exact.model.forward(
                build_batch([*chunks, *[padding] * num_padding], CPU), runner.storage
            )
        )
        for sequence in sequences:
            sequence.token_ids.extend(_ramp(length))
        states.append(everything(runner.storage))
        assert any(not torch.equal(a, b) for a, b in zip(before, states[-1], strict=True))
    assert_close(results[1], results[0])
    for padded, plain in zip(states[1], states[0], strict=True):
        assert_close(padded, plain)


@torch.inference_mode()
def test_padded_rows_of_poisoned_scratch_stay_harmless(exact: LoadedModel) -> None:
    runner = OneProcess(exact, max_seqs=1)
    poison(runner.storage)
    sequence = runner.new_sequence()
    padding = SequenceChunk([0], start=-1, block_ids=[0], slot=0)
    for start, length in ((0, 20), (20, 1)):
        chunk = SequenceChunk(_ramp(length), start, sequence.block_ids, sequence.slot)
        logits = exact.model.forward(build_batch([chunk, padding], CPU), runner.storage)
        assert not logits.isnan().any()


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


@pytest.mark.parametrize("size", [140, 1], ids=["one chunk", "single tokens"])
def test_deployed_numerics_store_rounded_rows(deployed: LoadedModel, size: int) -> None:
    runner = OneProcess(deployed, max_seqs=1)
    sequence = runner.new_sequence()
    runner.prefill(sequence, _tokens(140), chunk_size=size)
    for name in ("window_kv", "csa_kv", "hca_kv"):
        rows = _live(runner, deployed.layout.component(name), sequence)
        plain = rows[..., :-16].contiguous()
        assert rows.shape[1] and torch.equal(plain, round_trip_fp8(plain, 64))
        assert not torch.equal(rows[..., -16:], round_trip_fp8(rows[..., -16:].contiguous(), 64))
    index = _live(runner, deployed.layout.component("csa_index"), sequence)
    assert torch.equal(index, round_trip_fp4(index, 32))


def test_exact_numerics_round_nothing(exact: LoadedModel) -> None:
    runner = OneProcess(exact, max_seqs=1)
    sequence = runner.new_sequence()
    runner.prefill(sequence, _tokens(140))
    for name in ("window_kv", "csa_kv", "hca_kv"):
        rows = _live(runner, exact.layout.component(name), sequence).contiguous()
        assert not torch.isclose(rows, round_trip_fp8(rows, 64), rtol=1e-6).all()


def _tokens(count: int) -> list[int]:
    return torch.randint(0, 320, (count,)).tolist()


def _ramp(count: int) -> list[int]:
    return [(7 * i + 3) % 320 for i in range(count)]


def _live(runner: OneProcess, component: Component, sequence: OneSequence) -> Tensor:
    """[layers, rows, width]: what a hand-off ships of one component."""
    rows = component.shipped_rows(len(sequence.token_ids))
    index = runner.storage.row_index(component, rows, sequence.block_ids, sequence.slot)
    live = runner.storage.rows(component)[:, index]
    if component.name.startswith(("csa_", "index_")) and component.kind is Kind.RING:
        # of the block before the open one only the first half of each row is read again
        num_tail = len(sequence.token_ids) % component.live_align
        live = live.clone()
        live[:, : live.shape[1] - num_tail, live.shape[2] // 2 :] = 0
    return live
