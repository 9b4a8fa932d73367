"""Rows of a request in and out of the storage as bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scission.common.cache import storage as storage_module
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


@given(place=places(), part_bytes=st.sampled_from([1, 60, 200, 1 << 19]))
def test_what_is_fed_is_what_was_copied_in_order(place: RowPlace, part_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_module, "PART_BYTES", part_bytes)
        storage, target = make_storage(), make_storage()
        expected = expected_rows(storage, place).numpy()
        out = np.zeros(len(expected), np.uint8)
        fed: list[bytes] = []
        storage.read_rows(place, out, lambda part: fed.append(bytes(part)))
        assert b"".join(fed) == out.tobytes() == expected.tobytes()
        for private in (None, np.zeros_like(out)):
            fed.clear()
            target.write_rows(place, 255 - out, lambda part: fed.append(bytes(part)), private)
            assert b"".join(fed) == (255 - out).tobytes()
            assert torch.equal(expected_rows(target, place), torch.from_numpy(255 - out))


@given(place=places(), part_bytes=st.sampled_from([1, 60, 200, 1 << 19]))
def test_data_that_changes_meanwhile_is_fed_as_it_was_written(
    place: RowPlace, part_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_module, "PART_BYTES", part_bytes)
        target = make_storage()
        data = expected_rows(make_storage(), place).numpy().copy()
        fed: list[bytes] = []

        def feed(part: memoryview) -> None:
            # a writer that strikes between the copy and the hash
            data[:] += 1
            fed.append(bytes(part))

        target.write_rows(place, data, feed, np.zeros_like(data))
        assert b"".join(fed) == expected_rows(target, place).numpy().tobytes()


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
    device.begin_write(place, 255 - out)()
    device.read_rows(place, out)
    assert torch.equal(torch.from_numpy(out), 255 - expected)
