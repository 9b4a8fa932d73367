"""The tensors behind a layout: block pools and state slots on one device, rows in and out as bytes.

Block 0 and slot 0 are scratch: padding writes there, nothing reads them, no pool hands them out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scission.common.cache.device_rows import DeviceRows
from scission.common.cache.layout import CacheLayout, Component, Kind

SCRATCH = 0

Bytes = NDArray[np.uint8]
Feed = Callable[[memoryview], object]
# (offset in the row range, count, where): `where` is the first of consecutive rows, or whole blocks
Segment = tuple[int, int, int | NDArray[np.int64]]
PART_BYTES = 1 << 19  # copied, then hashed while still in the core's own cache


class Mark(Protocol):
    """A point in a device's work."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Rows [first, last) of one request in some layers of one component, and where the request
    lies.

    Rows are entry numbers (paged), positions (ring) or 0..1 (tail); layers count the component's
    own.
    """

    component: int  # position in the layout
    layers: tuple[int, int]
    rows: tuple[int, int]
    block_ids: Sequence[int]
    slot: int


class CacheStorage:
    """All state of one rank. `paged[name]` is [layers, num_blocks, rows_per_block, *row_shape],
    `slots[name]` is [layers, num_slots, ring_size (tail: 1), *row_shape]; dim 0 counts the
    component's own layers.
    """

    def __init__(
        self, layout: CacheLayout, num_blocks: int, num_slots: int, device: torch.device
    ) -> None:
        """`num_blocks` and `num_slots` include the scratch ones."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_slots = num_slots
        self.device = device
        self.paged: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}
        self._byte_views: dict[str, Bytes] = {}
        self.on_device = DeviceRows(device) if device.type == "cuda" else None
        for c in layout.components:
            dtype = getattr(torch, c.dtype)
            if c.kind is Kind.PAGED:
                shape = (len(c.layers), num_blocks, layout.rows_per_block(c), *c.row_shape)
                self.paged[c.name] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                shape = (len(c.layers), num_slots, max(c.ring_size, 1), *c.row_shape)
                self.slots[c.name] = torch.full(shape, c.initial, dtype=dtype, device=device)

    def reset_slot(self, slot: int) -> None:
        """Make a slot clean: its previous user's rows become unreachable."""
        for c in self.layout.per_slot:
            self.slots[c.name][:, slot].fill_(c.initial)

    def copy_slot(self, source: int, target: int) -> None:
        for c in self.layout.per_slot:
            self.slots[c.name][:, target].copy_(self.slots[c.name][:, source])

    def copy_block(self, source: int, target: int) -> None:
        for c in self.layout.paged:
            self.paged[c.name][:, target].copy_(self.paged[c.name][:, source])

    def rows(self, component: Component) -> Tensor:
        """The component's rows flattened: [layers, num_blocks * rows_per_block or num_slots *
        ring_size, row].
        """
        tensor = self.paged.get(component.name)
        if tensor is None:
            tensor = self.slots[component.name]
        return tensor.view(tensor.shape[0], tensor.shape[1] * tensor.shape[2], -1)

    def row_index(
        self, component: Component, rows: tuple[int, int], block_ids: Sequence[int], slot: int
    ) -> Tensor:
        """Where rows [first, last) of one request lie in dim 1 of `rows(component)`: [last - first]
        int64.
        """
        numbers = torch.arange(*rows)
        match component.kind:
            case Kind.PAGED:
                per_block = self.layout.rows_per_block(component)
                table = torch.tensor(block_ids, dtype=torch.int64)
                return table[numbers // per_block] * per_block + numbers % per_block
            case Kind.RING:
                return slot * component.ring_size + numbers % component.ring_size
            case Kind.TAIL:
                return numbers + slot

    def gather(
        self, component: Component, layers: tuple[int, int], index: Tensor, out: Tensor
    ) -> None:
        """Copy rows into `out`, canonical order (layer, then row).

        Args:
            layers: [first, last) among the component's own layers.
            index: [num_rows] int64, from `row_index`.
            out: [num_layers, num_rows, row_bytes] uint8, contiguous.
        """
        source = self.rows(component)[layers[0] : layers[1]].view(torch.uint8)
        torch.index_select(source, 1, index.to(self.device), out=out)

    def scatter(
        self, component: Component, layers: tuple[int, int], index: Tensor, data: Tensor
    ) -> None:
        """The inverse of `gather`: write `data` [num_layers, num_rows, row_bytes] uint8 into the
        rows.
        """
        target = self.rows(component)[layers[0] : layers[1]].view(torch.uint8)
        target.index_copy_(1, index.to(self.device), data)

    def mark(self) -> Mark | None:
        """The work given to the device so far by this thread; None where it is done already.

        Rows that it writes may be read by another thread once the mark is passed.
        """
        if self.device.type != "cuda":
            return None
        mark: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def read_rows(self, place: RowPlace, out: Bytes, feed: Feed | None = None) -> None:
        """Copy the rows into host memory, canonical order (layer, then row).

        Args:
            out: [num_layers * num_rows * row_bytes] uint8, contiguous.
            feed: is given all of `out`, part by part in order, while it is warm in the caches.
        """
        component = self.layout.components[place.component]
        if self.on_device is not None:
            self.on_device.read(*self._placed(component, place), out)
            if feed is not None:
                feed(out.data)
            return
        base = self._row_bytes(component)[place.layers[0] : place.layers[1]]
        shaped = out.reshape(base.shape[0], place.rows[1] - place.rows[0], base.shape[2])
        for layers, rows, segments in self._parts(component, place):
            for at, count, where in segments:
                part = shaped[layers, at : at + count]
                if isinstance(where, int):
                    np.copyto(part, base[layers, where : where + count])
                    continue
                blocks, part = self._as_blocks(component, base[layers], part)
                if part.flags.c_contiguous:
                    np.take(blocks, where, axis=1, out=part, mode="clip")
                else:
                    for layer in range(len(blocks)):
                        np.take(blocks[layer], where, axis=0, out=part[layer], mode="clip")
            if feed is not None:
                feed(shaped[layers, rows].data)

    def write_rows(
        self,
        place: RowPlace,
        data: Bytes,
        feed: Feed | None = None,
        private: Bytes | None = None,
    ) -> None:
        """The inverse of `read_rows`, of a storage in host memory.

        Args:
            data: [num_layers * num_rows * row_bytes] uint8, contiguous.
            feed: is given what was written, part by part in order.
            private: for data that others can still change: a buffer as long as it. Then what is fed
                is read from the rows or from this buffer, never from the data.
        """
        component = self.layout.components[place.component]
        assert self.on_device is None, "see begin_write"
        base = self._row_bytes(component)[place.layers[0] : place.layers[1]]
        shape = (base.shape[0], place.rows[1] - place.rows[0], base.shape[2])
        shaped = data.reshape(shape)
        copy = None if private is None else private.reshape(shape)
        for layers, rows, segments in self._parts(component, place):
            part = fed = shaped[layers, rows]
            if copy is not None:
                in_place = self._in_place(base, layers, segments)
                if in_place is not None:
                    fed = in_place
                else:
                    part = fed = copy[layers, rows]
                    np.copyto(part, shaped[layers, rows])
            for at, count, where in segments:
                self._write_segment(
                    component, base[layers], part[:, at - rows.start :][:, :count], where
                )
            if feed is not None:
                feed(fed.data)

    def begin_write(self, place: RowPlace, data: Bytes) -> Callable[[], None]:
        """`write_rows` of a storage on a device: returns at once, with what waits for the end."""
        assert self.on_device is not None, "see write_rows"
        component = self.layout.components[place.component]
        return self.on_device.write(*self._placed(component, place), data)

    def _placed(self, component: Component, place: RowPlace) -> tuple[Tensor, Tensor]:
        """The rows of the place's layers, and which of them are meant."""
        rows = self.rows(component)[place.layers[0] : place.layers[1]]
        return rows, self.row_index(component, place.rows, place.block_ids, place.slot)

    def _in_place(self, base: Bytes, layers: slice, segments: list[Segment]) -> Bytes | None:
        """The rows themselves, where they lie without a gap."""
        if len(segments) == 1 and layers.stop - layers.start == 1:
            _, count, where = segments[0]
            if isinstance(where, int):
                rows: Bytes = base[layers, where : where + count]
                return rows
        return None

    def _write_segment(
        self, component: Component, base: Bytes, part: Bytes, where: int | NDArray[np.int64]
    ) -> None:
        """Write [layers, rows, row_bytes] to consecutive rows, or to whole blocks."""
        if isinstance(where, int):
            np.copyto(base[:, where : where + part.shape[1]], part)
            return
        blocks, part = self._as_blocks(component, base, part)
        # one opaque item a block: numpy moves items, not bytes, through an index
        item = np.dtype((np.void, blocks.shape[2]))
        for layer in range(len(blocks)):
            blocks[layer].view(item)[where, 0] = part[layer].view(item)[:, 0]

    def _parts(
        self, component: Component, place: RowPlace
    ) -> Iterator[tuple[slice, slice, list[Segment]]]:
        """The rows in canonical order as (layers, offsets in the row range, segments), each part as
        large as a core's own cache likes and contiguous in the canonical data.
        """
        segments = self._segments(component, place)
        num_layers = place.layers[1] - place.layers[0]
        num_rows = place.rows[1] - place.rows[0]
        layer_bytes = num_rows * component.row_bytes
        if layer_bytes <= PART_BYTES:
            step = PART_BYTES // layer_bytes
            for layer in range(0, num_layers, step):
                yield slice(layer, min(layer + step, num_layers)), slice(0, num_rows), segments
            return
        small = list(self._split(component, segments))
        for layer in range(num_layers):
            for segment in small:
                at, count, _ = segment
                yield slice(layer, layer + 1), slice(at, at + count), [segment]

    def _split(self, component: Component, segments: list[Segment]) -> Iterator[Segment]:
        max_rows = max(1, PART_BYTES // component.row_bytes)
        per_block = self.layout.rows_per_block(component)
        for at, count, where in segments:
            if isinstance(where, int):
                for first in range(0, count, max_rows):
                    yield at + first, min(max_rows, count - first), where + first
            else:
                step = max(1, max_rows // per_block)
                for i in range(0, len(where), step):
                    ids = where[i : i + step]
                    yield at + i * per_block, len(ids) * per_block, ids

    def _row_bytes(self, component: Component) -> Bytes:
        """`rows(component)` of a CPU storage as bytes: [layers, rows, row_bytes], the same
        memory.
        """
        view = self._byte_views.get(component.name)
        if view is None:
            view = self.rows(component).view(torch.uint8).numpy()
            self._byte_views[component.name] = view
        return view

    def _as_blocks(self, component: Component, base: Bytes, part: Bytes) -> tuple[Bytes, Bytes]:
        """Both with whole blocks as their items: [layers, blocks, block bytes]."""
        size = self.layout.rows_per_block(component) * component.row_bytes
        layers = base.shape[0]
        return base.reshape(layers, -1, size), part.reshape(layers, -1, size)

    def _segments(self, component: Component, place: RowPlace) -> list[Segment]:
        first, last = place.rows
        if component.kind is Kind.TAIL:
            return [(0, last - first, place.slot + first)]
        if component.kind is Kind.RING:
            size, base = component.ring_size, place.slot * component.ring_size
            at = first % size
            before_wrap = min(last - first, size - at)
            runs: list[Segment] = [(0, before_wrap, base + at)]
            if before_wrap < last - first:
                runs.append((before_wrap, last - first - before_wrap, base))
            return runs
        per_block = self.layout.rows_per_block(component)
        table = np.asarray(place.block_ids[first // per_block : -(-last // per_block)], np.int64)
        if len(table) == 1 or bool((table[1:] - table[:-1] == 1).all()):
            return [(0, last - first, int(table[0]) * per_block + first % per_block)]
        segments: list[Segment] = []
        head = -first % per_block
        tail = last % per_block
        if head:
            segments.append((0, head, int(table[0]) * per_block + first % per_block))
        whole = table[bool(head) : len(table) - bool(tail)]
        if len(whole):
            segments.append((head, len(whole) * per_block, whole))
        if tail:
            segments.append((last - first - tail, tail, int(table[-1]) * per_block))
        return segments
