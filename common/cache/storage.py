"""The tensors behind a layout: block pools and state slots on one device, rows in and out as bytes.

Block 0 and slot 0 are scratch: padding writes there, nothing reads them, no pool hands them out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind

SCRATCH = 0

Bytes = NDArray[np.uint8]


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
        # reading for a transfer does not wait for the steps that run meanwhile
        self._read_stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
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

    def read_rows(self, place: RowPlace, out: Bytes) -> None:
        """Copy the rows into host memory, canonical order (layer, then row).

        Args:
            out: [num_layers * num_rows * row_bytes] uint8, contiguous.
        """
        component = self.layout.components[place.component]
        if self.device.type != "cpu":
            index = self.row_index(component, place.rows, place.block_ids, place.slot)
            source = self.rows(component)[place.layers[0] : place.layers[1]].view(torch.uint8)
            with torch.cuda.stream(self._read_stream):
                picked = torch.index_select(source, 1, index.to(self.device))
                # to pageable memory: the copy is complete when this returns
                torch.from_numpy(out).copy_(picked.view(-1))
            return
        base = self._row_bytes(component)[place.layers[0] : place.layers[1]]
        shaped = out.reshape(base.shape[0], place.rows[1] - place.rows[0], base.shape[2])
        for at, count, where in self._segments(component, place):
            part = shaped[:, at : at + count]
            if isinstance(where, int):
                np.copyto(part, base[:, where : where + count])
                continue
            blocks, part = self._as_blocks(component, base, part)
            if part.flags.c_contiguous:
                np.take(blocks, where, axis=1, out=part, mode="clip")
            else:
                for layer in range(len(blocks)):
                    np.take(blocks[layer], where, axis=0, out=part[layer], mode="clip")

    def write_rows(self, place: RowPlace, data: Bytes) -> None:
        """The inverse of `read_rows`: `data` is [num_bytes] uint8, contiguous."""
        component = self.layout.components[place.component]
        if self.device.type != "cpu":
            index = self.row_index(component, place.rows, place.block_ids, place.slot)
            target = self.rows(component)[place.layers[0] : place.layers[1]].view(torch.uint8)
            # the copy to the device is complete before this returns: pageable memory is staged by
            # the driver
            rows = torch.from_numpy(data).to(self.device)
            target.index_copy_(
                1, index.to(self.device), rows.view(target.shape[0], -1, target.shape[2])
            )
            return
        base = self._row_bytes(component)[place.layers[0] : place.layers[1]]
        shaped = data.reshape(base.shape[0], place.rows[1] - place.rows[0], base.shape[2])
        for at, count, where in self._segments(component, place):
            part = shaped[:, at : at + count]
            if isinstance(where, int):
                np.copyto(base[:, where : where + count], part)
                continue
            blocks, part = self._as_blocks(component, base, part)
            # one opaque item a block: numpy moves items, not bytes, through an index
            item = np.dtype((np.void, blocks.shape[2]))
            for layer in range(len(blocks)):
                blocks[layer].view(item)[where, 0] = part[layer].view(item)[:, 0]

    def spans(self, place: RowPlace, min_bytes: int) -> list[Bytes] | None:
        """The rows' own memory as contiguous spans in canonical order; None off the CPU, or where
        spans would be shorter than `min_bytes` on average.
        """
        if self.device.type != "cpu":
            return None
        component = self.layout.components[place.component]
        runs: list[tuple[int, int]] = []
        per_block = self.layout.rows_per_block(component)
        for _, count, where in self._segments(component, place):
            if isinstance(where, int):
                runs.append((where, count))
            else:
                runs += [(block * per_block, per_block) for block in where.tolist()]
        if (place.rows[1] - place.rows[0]) * component.row_bytes < min_bytes * len(runs):
            return None
        base = self._row_bytes(component)
        return [
            base[layer, first : first + count].reshape(-1)
            for layer in range(*place.layers)
            for first, count in runs
        ]

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

    def _segments(
        self, component: Component, place: RowPlace
    ) -> list[tuple[int, int, int | NDArray[np.int64]]]:
        """The rows as (offset in the range, count, where): `where` is the first of consecutive
        rows, or the ids of whole blocks.
        """
        first, last = place.rows
        if component.kind is Kind.TAIL:
            return [(0, last - first, place.slot + first)]
        if component.kind is Kind.RING:
            size, base = component.ring_size, place.slot * component.ring_size
            at = first % size
            before_wrap = min(last - first, size - at)
            runs: list[tuple[int, int, int | NDArray[np.int64]]] = [(0, before_wrap, base + at)]
            if before_wrap < last - first:
                runs.append((before_wrap, last - first - before_wrap, base))
            return runs
        per_block = self.layout.rows_per_block(component)
        table = np.asarray(place.block_ids[first // per_block : -(-last // per_block)], np.int64)
        if len(table) == 1 or bool((table[1:] - table[:-1] == 1).all()):
            return [(0, last - first, int(table[0]) * per_block + first % per_block)]
        segments: list[tuple[int, int, int | NDArray[np.int64]]] = []
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
