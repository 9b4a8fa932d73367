"""Rows of a request in and out of the storage as bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage, RowPlace

LAYOUT = CacheLayout(
    (
        Component("paged", Kind.PAGED, (0, 1, 2), (3, 5), "bfloat16", tokens_per_row=2),
        Component("one_row_a_block", Kind.PAGED, (0, 2), (7,), "uint8", tokens_per_row=8),
        Component("ring", Kind.RING, (0, 1), (6,), "float32", ring_size=8, live_lookback=7),
        Component("tail", Kind.TAIL, (1, 2), (), "float32"),
    ),
    block_size=8,
)


def make_storage() -> CacheStorage:
    storage = CacheStorage(LAYOUT, 12, 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in (*storage.paged.values(), *storage.slots.values()):
        view = tensor.view(torch.uint8)
        view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=generator))
    return storage


@st.composite
def places(draw: st.DrawFn) -> RowPlace:
    number = draw(st.integers(0, len(LAYOUT.components) - 1))
    component = LAYOUT.components[number]
    first_layer = draw(st.integers(0, len(component.layers) - 1))
    layers = (first_layer, draw(st.integers(first_layer + 1, len(component.layers))))
    num_tokens = draw(st.integers(8, 80))
    live = component.shipped_rows(num_tokens)
    first = draw(st.integers(live[0], live[1] - 1))
    rows = (first, draw(st.integers(first + 1, live[1])))
    if draw(st.booleans()):
        start = draw(st.integers(1, 2))
        block_ids = list(range(start, start + 10))
    else:
        block_ids = draw(st.permutations(range(1, 12)))[:10]
    return RowPlace(number, layers, rows, block_ids, draw(st.integers(0, 3)))


def expected_rows(storage: CacheStorage, place: RowPlace) -> torch.Tensor:
    component = LAYOUT.components[place.component]
    at = storage.row_index(component, place.rows, place.block_ids, place.slot)
    rows = storage.rows(component)[place.layers[0] : place.layers[1]].view(torch.uint8)
    return rows[:, at].reshape(-1)


@given(place=places())
def test_read_rows_is_layer_major_then_row(place: RowPlace) -> None:
    storage = make_storage()
    expected = expected_rows(storage, place)
    out = np.zeros(len(expected), np.uint8)
    storage.read_rows(place, out)
    assert torch.equal(torch.from_numpy(out), expected)


@given(place=places())
def test_write_rows_changes_those_rows_and_no_other(place: RowPlace) -> None:
    storage, target = make_storage(), make_storage()
    expected = make_storage()
    num_bytes = len(expected_rows(storage, place))
    data = np.random.default_rng(1).integers(0, 256, num_bytes, dtype=np.uint8)
    target.write_rows(place, data)
    component = LAYOUT.components[place.component]
    at = expected.row_index(component, place.rows, place.block_ids, place.slot)
    view = expected.rows(component)[place.layers[0] : place.layers[1]].view(torch.uint8)
    view[:, at] = torch.from_numpy(data).view(view.shape[0], len(at), -1)
    for name in ("paged", "slots"):
        for key, tensor in getattr(target, name).items():
            want = getattr(expected, name)[key].view(torch.uint8)
            assert torch.equal(tensor.view(torch.uint8), want), key


@given(place=places())
def test_spans_laid_end_to_end_are_the_rows(place: RowPlace) -> None:
    storage = make_storage()
    spans = storage.spans(place, min_bytes=1)
    assert spans is not None
    got = torch.from_numpy(np.concatenate(spans))
    assert torch.equal(got, expected_rows(storage, place))


def test_scattered_rows_have_no_long_spans() -> None:
    storage = make_storage()
    place = RowPlace(0, (0, 1), (0, 16), [9, 2, 7, 4], 1)
    assert storage.spans(place, min_bytes=4 * 30) is not None
    assert storage.spans(place, min_bytes=4 * 30 + 1) is None


@pytest.mark.gpu
@given(place=places())
def test_rows_of_a_device_read_and_write_as_those_of_the_cpu(place: RowPlace) -> None:
    cpu = make_storage()
    device = CacheStorage(LAYOUT, 12, 4, torch.device("cuda"))
    for name in ("paged", "slots"):
        for key, tensor in getattr(device, name).items():
            tensor.copy_(getattr(cpu, name)[key])
    expected = expected_rows(cpu, place)
    out = np.zeros(len(expected), np.uint8)
    device.read_rows(place, out)
    assert torch.equal(torch.from_numpy(out), expected)
    device.write_rows(place, 255 - out)
    device.read_rows(place, out)
    assert torch.equal(torch.from_numpy(out), 255 - expected)
