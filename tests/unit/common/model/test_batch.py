"""A batch as tensors: what is laid where."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scission.common.model.batch import (
    SequenceChunk,
    Snapshot,
    build_batch,
    pack_into,
    packed_bytes,
    unpack,
)

CPU = torch.device("cpu")
CHUNKS = (
    SequenceChunk([5, 6, 7], 2, [3, 4], 1, snapshots=(Snapshot(9, 4),)),
    SequenceChunk([8], 0, [5], 2, logits="none"),
    SequenceChunk([9, 10], 0, [6], 3, logits="all"),
    SequenceChunk([0], -1, [0], 0),
)


def test_places_hold_what_the_chunks_say() -> None:
    batch = build_batch(CHUNKS, CPU, block_size=4)
    places = batch.places
    assert places.positions.tolist() == [2, 3, 4, 0, 0, 1, -1]
    assert places.sequences.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert places.cu_seqlens.tolist() == [0, 3, 4, 6, 7]
    assert places.context_lens.tolist() == [5, 1, 2, 0]
    assert places.block_tables.tolist() == [[3, 4], [5, 0], [6, 0], [0, 0]]
    assert places.slots.tolist() == [1, 2, 3, 0]
    assert places.writer_sequences.tolist() == [0, 0, 1, 2, 3]
    assert places.writer_slots.tolist() == [1, 9, 2, 3, 0]
    assert places.writer_ends.tolist() == [5, 4, 1, 2, 0]
    assert (places.block_size, places.max_tokens, places.max_context) == (4, 3, 5)
    assert not places.is_single
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 0]
    assert batch.logits_at.tolist() == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("chunk", "is_single"),
    [
        (SequenceChunk([1], 7, [1], 1), True),
        (SequenceChunk([1, 2], 7, [1], 1), False),
        (SequenceChunk([1], 7, [1], 1, snapshots=(Snapshot(2, 8),)), False),
    ],
)
def test_only_lone_tokens_without_snapshots_are_single(
    chunk: SequenceChunk, is_single: bool
) -> None:
    assert build_batch([chunk], CPU).places.is_single == is_single


def test_arrays_that_travel_in_one_buffer_arrive_as_they_were() -> None:
    arrays: tuple[NDArray[Any], ...] = (
        np.arange(3),
        np.array([], np.int64),
        np.arange(5, dtype=np.int32),
        np.arange(6).reshape(2, 3),
    )
    # the packed way of other devices, whose pinned memory a CPU-only torch lacks
    packed = torch.empty(packed_bytes(arrays), dtype=torch.uint8)
    pack_into(packed, arrays)
    sent = unpack(packed, arrays)
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.data_ptr() % 16 == 0
        assert tensor.numpy().dtype == array.dtype
        assert tensor.tolist() == array.tolist()
