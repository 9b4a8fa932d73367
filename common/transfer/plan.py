"""Which rows a chunk holds: a piece of the prompt's state cut into chunks, and a chunk checked
against a request.

A chunk is a rectangle (layers x rows) of one component, at most one arena slot of bytes. The
receiver counts every row of every layer exactly once, whatever order and cut the sender chose.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.errors import ConfigError, WireError


@dataclass(frozen=True, slots=True)
class Piece:
    """Paged rows that are final: these tokens in these model layers."""

    layers: tuple[int, int]
    tokens: tuple[int, int]

    def joined(self, other: "Piece") -> "Piece | None":
        """Both as one piece, where they lie side by side."""
        if self.layers == other.layers:
            if self.tokens[1] == other.tokens[0]:
                return Piece(self.layers, (self.tokens[0], other.tokens[1]))
            if other.tokens[1] == self.tokens[0]:
                return Piece(self.layers, (other.tokens[0], self.tokens[1]))
        if self.tokens == other.tokens:
            if self.layers[1] == other.layers[0]:
                return Piece((self.layers[0], other.layers[1]), self.tokens)
            if other.layers[1] == self.layers[0]:
                return Piece((other.layers[0], self.layers[1]), self.tokens)
        return None


@dataclass(frozen=True, slots=True)
class ChunkRows:
    component: int
    layers: tuple[int, int]  # of the component's own
    rows: tuple[int, int]
    num_bytes: int


def add_piece(pieces: list[Piece], piece: Piece) -> None:
    """Append the piece, joined with those that it touches: fewer and larger chunks when shipping
    lags behind.
    """
    while True:
        for i, other in enumerate(pieces):
            joined = other.joined(piece)
            if joined is not None:
                del pieces[i]
                piece = joined
                break
        else:
            pieces.append(piece)
            return


def piece_chunks(layout: CacheLayout, piece: Piece, max_bytes: int) -> Iterator[ChunkRows]:
    """The paged rows of a piece as chunks."""
    for number, component in enumerate(layout.components):
        if component.kind is not Kind.PAGED:
            continue
        layers = own_layers(component, piece.layers)
        rows = component.rows_between(*piece.tokens)
        yield from _cut(
            number, component, layers, rows, layout.rows_per_block(component), max_bytes
        )


def final_chunks(layout: CacheLayout, num_tokens: int, max_bytes: int) -> Iterator[ChunkRows]:
    """Rings and tails after `num_tokens` tokens, live rows only, all layers."""
    for number, component in enumerate(layout.components):
        if component.kind is Kind.PAGED:
            continue
        layers = (0, len(component.layers))
        yield from _cut(number, component, layers, component.shipped_rows(num_tokens), 1, max_bytes)


def own_layers(component: Component, model_layers: tuple[int, int]) -> tuple[int, int]:
    """[first, last) of the component's own layers among the model's."""
    first = bisect_left(component.layers, model_layers[0])
    return first, bisect_left(component.layers, model_layers[1])


def _cut(
    number: int,
    component: Component,
    layers: tuple[int, int],
    rows: tuple[int, int],
    row_multiple: int,
    max_bytes: int,
) -> Iterator[ChunkRows]:
    """Whole layers together while they fit, else one layer's rows, cut at multiples of
    `row_multiple`.
    """
    num_rows = rows[1] - rows[0]
    if num_rows <= 0 or layers[0] >= layers[1]:
        return
    row_bytes = component.row_bytes
    layer_bytes = num_rows * row_bytes
    if layer_bytes <= max_bytes:
        step = max_bytes // layer_bytes
        for first in range(layers[0], layers[1], step):
            last = min(first + step, layers[1])
            yield ChunkRows(number, (first, last), rows, (last - first) * layer_bytes)
        return
    step = max_bytes // row_bytes
    if step > row_multiple:
        step -= step % row_multiple
    for layer in range(*layers):
        first = rows[0]
        while first < rows[1]:
            # the first cut evens out a start inside a block, so that later chunks hold whole blocks
            end = first + step
            if step >= row_multiple:
                end -= end % row_multiple
            last = min(end, rows[1])
            yield ChunkRows(number, (layer, layer + 1), (first, last), (last - first) * row_bytes)
            first = last


def check_slot_bytes(layout: CacheLayout, slot_bytes: int) -> int:
    """The bytes of the layout's longest row; raises ConfigError where it does not fit a slot."""
    longest = max(layout.components, key=lambda component: component.row_bytes)
    if longest.row_bytes > slot_bytes:
        raise ConfigError(
            f"transfer.slot_bytes must hold a row of {longest.name}: "
            f"{longest.row_bytes} bytes, got {slot_bytes}"
        )
    return longest.row_bytes


class Coverage:
    """Which rows of a request have come: each exactly once.

    A chunk claims its rows when it arrives, so that nothing else is written there, and gives them
    back if it turns out damaged. Costs one byte a row and layer, bounded by what the reservation
    declared.
    """

    def __init__(self, layout: CacheLayout, num_tokens: int) -> None:
        self._layout = layout
        self._rows = [component.shipped_rows(num_tokens) for component in layout.components]
        self._claimed: dict[int, NDArray[np.bool_]] = {}
        self.claimed_bytes = 0
        self.total_bytes = layout.shipped_bytes(num_tokens)

    @property
    def is_complete(self) -> bool:
        return self.claimed_bytes == self.total_bytes

    def claim(self, chunk: ChunkRows) -> None:
        """Raises WireError unless the chunk lies within the request's live rows, is as long as it
        says, and none of its rows is claimed.
        """
        components = self._layout.components
        if chunk.component >= len(components):
            raise WireError(f"component {chunk.component} of {len(components)}")
        component = components[chunk.component]
        first, last = self._rows[chunk.component]
        if not first <= chunk.rows[0] < chunk.rows[1] <= last:
            raise WireError(f"{component.name}: rows {chunk.rows} of {(first, last)}")
        if not 0 <= chunk.layers[0] < chunk.layers[1] <= len(component.layers):
            raise WireError(f"{component.name}: layers {chunk.layers} of {len(component.layers)}")
        num_rows = (chunk.layers[1] - chunk.layers[0]) * (chunk.rows[1] - chunk.rows[0])
        if num_rows * component.row_bytes != chunk.num_bytes:
            raise WireError(f"{component.name}: {num_rows} rows in {chunk.num_bytes} bytes")
        part = self._part(chunk)
        if part.any():
            raise WireError(f"{component.name}: rows {chunk.rows} came twice")
        part[:] = True
        self.claimed_bytes += chunk.num_bytes

    def release(self, chunk: ChunkRows) -> None:
        """Give a claimed chunk's rows back."""
        self._part(chunk)[:] = False
        self.claimed_bytes -= chunk.num_bytes

    def _part(self, chunk: ChunkRows) -> NDArray[np.bool_]:
        first, last = self._rows[chunk.component]
        claimed = self._claimed.get(chunk.component)
        if claimed is None:
            component = self._layout.components[chunk.component]
            claimed = np.zeros((len(component.layers), last - first), np.bool_)
            self._claimed[chunk.component] = claimed
        return claimed[
            chunk.layers[0] : chunk.layers[1], chunk.rows[0] - first : chunk.rows[1] - first
        ]
