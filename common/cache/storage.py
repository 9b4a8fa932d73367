"""The tensors behind a layout: block pools and state slots on one device, rows in and out as bytes.

Block 0 and slot 0 are scratch: padding writes there, nothing reads them, no pool hands them out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind

SCRATCH = 0


class CacheStorage:
    """All state of one rank. `paged[name]` is [layers, num_blocks, rows_per_block, *row_shape], `slots[name]` is
    [layers, num_slots, ring_size (tail: 1), *row_shape]; dim 0 counts the component's own layers."""

    def __init__(self, layout: CacheLayout, num_blocks: int, num_slots: int, device: torch.device) -> None:
        """`num_blocks` and `num_slots` include the scratch ones."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_slots = num_slots
        self.device = device
        self.paged: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}
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
        """The component's rows flattened: [layers, num_blocks * rows_per_block or num_slots * ring_size, row]."""
        tensor = self.paged.get(component.name)
        if tensor is None:
            tensor = self.slots[component.name]
        return tensor.flatten(1, 2).flatten(2)

    def row_index(
        self, component: Component, rows: tuple[int, int], block_ids: Sequence[int], slot: int
    ) -> Tensor:
        """Where rows [first, last) of one request lie in dim 1 of `rows(component)`: [last - first] int64."""
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

    def gather(self, component: Component, layers: tuple[int, int], index: Tensor, out: Tensor) -> None:
        """Copy rows into `out`, canonical order (layer, then row).

        Args:
            layers: [first, last) among the component's own layers.
            index: [num_rows] int64, from `row_index`.
            out: [num_layers, num_rows, row_bytes] uint8, contiguous.
        """
        source = self.rows(component)[layers[0] : layers[1]].view(torch.uint8)
        torch.index_select(source, 1, index.to(self.device), out=out)

    def scatter(self, component: Component, layers: tuple[int, int], index: Tensor, data: Tensor) -> None:
        """The inverse of `gather`: write `data` [num_layers, num_rows, row_bytes] uint8 into the rows."""
        target = self.rows(component)[layers[0] : layers[1]].view(torch.uint8)
        target.index_copy_(1, index.to(self.device), data)
