"""Rows of a pool (a layer's ring slots or blocks, flattened): by row number as a host plans them
(`write_rows_`, `recent_rows`), or by where a batch lies on the device (`write_ring_`,
`write_paged_`).
"""

from torch import Tensor

from scission.kernels.cache import reference
from scission.kernels.places import Places
from scission.kernels.target import target_of

__all__ = ["recent_rows", "write_paged_", "write_ring_", "write_rows_"]


def write_rows_(pool: Tensor, rows: Tensor, values: Tensor, tokens: Tensor | None = None) -> None:
    """pool[rows[i]] = values[tokens[i]], in place.

    Args:
        pool: [num_rows, width].
        rows: [n] int64, distinct but for scratch rows.
        values: [num_tokens, width] of the pool's dtype.
        tokens: [n] int64; None: all tokens in order.
    """
    num_values = values.shape[0] if tokens is None else tokens.shape[0]
    if rows.shape[0] != num_values or pool.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"{num_values} rows {list(values.shape[1:])} do not fit {rows.shape[0]} rows "
            f"of a pool {list(pool.shape)}"
        )
    reference.write_rows_(pool, rows, values, tokens)


def recent_rows(
    pool: Tensor | None, rows: Tensor | None, fresh: Tensor, initial: float | None = None
) -> Tensor:
    """What a chunk can look back on: the pool's rows before it, then its own, then an initial row.

    Args:
        pool: [num_rows, width]; None: nothing came before.
        rows: [r] int64, of the pool; None: none.
        fresh: [num_tokens, width] of the pool's dtype.
        initial: value of one last row; None: no such row.

    Returns:
        [r + num_tokens (+ 1), width].
    """
    return reference.recent_rows(pool, rows, fresh, initial)


def write_ring_(ring: Tensor, values: Tensor, size: int, places: Places) -> None:
    """ring[slot * size + position % size] = the position's row, in place, for every writer's
    last `size` positions of this step; of padding nothing.

    Args:
        ring: [num_slots * size, width].
        values: [num_tokens, width] of the ring's dtype.
    """
    _check_values(ring, values, places)
    if target_of(ring.device) is None:
        reference.write_ring_(ring, values, size, places)
        return
    # only where a kernel is launched is Triton needed
    from scission.kernels.cache import write_rows

    write_rows.write_ring_(ring, values, size, places)


def write_paged_(pool: Tensor, values: Tensor, places: Places) -> None:
    """Write every token's row to where its sequence's block table says, in place; of padding
    nothing.

    Args:
        pool: [num_blocks * places.block_size, width].
        values: [num_tokens, width] of the pool's dtype.
    """
    _check_values(pool, values, places)
    if target_of(pool.device) is None:
        reference.write_paged_(pool, values, places)
        return
    from scission.kernels.cache import write_rows

    write_rows.write_paged_(pool, values, places)


def _check_values(pool: Tensor, values: Tensor, places: Places) -> None:
    if values.dtype != pool.dtype or values.shape != (places.num_tokens, pool.shape[1]):
        raise ValueError(
            f"values {list(values.shape)} {values.dtype} do not fit {places.num_tokens} tokens "
            f"and a pool {list(pool.shape)} {pool.dtype}"
        )
