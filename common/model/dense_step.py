"""A step in the eyes of layers with per-head K and V: their heads, from projections to outputs.

`ListedStep` goes by row lists that the host has planned (`dense_plan`): the CPU's, and the
definition. `PlacedStep` asks nothing of the host: kernels work out rows from addresses on the
device, so that a captured graph serves whatever these hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scission.common.layers.row_input import RowInput
from scission.common.model.batch import ForwardBatch
from scission.common.model.dense_plan import KindPlan, LayerKind, plan_kinds, turn_of
from scission.kernels.cache import recent_rows, write_rows_
from scission.kernels.dense_attention import Heads, Turn, attend_dense, attend_heads, turn_heads
from scission.kernels.linear import Rows, Sums, whole_sums
from scission.kernels.places import Places


@dataclass(frozen=True, slots=True)
class KeyValues:
    """One layer's rows of a storage: [rows, num_kv_heads * head_dim] each, blocks or rings."""

    k: Tensor
    v: Tensor


class Step(Protocol):
    """One batch, for the layers of one kind."""

    def attend(
        self, qkv: Sums, heads: Heads, state: KeyValues, gate: Tensor | None, wanted: RowInput
    ) -> Rows:
        """Turn, keep and attend: the rows that the output projection takes.

        Args:
            qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], as projected.
            gate: [num_tokens, num_heads], for the sigmoids that heads are multiplied by.
            wanted: how the output projection takes them.

        Returns:
            [num_tokens, num_heads * head_dim].
        """


def plan_steps(
    batch: ForwardBatch, kinds: Mapping[str, LayerKind], block_size: int
) -> Mapping[str, Step]:
    """The step of every kind of layer, by its name."""
    if batch.positions.device.type == "cpu" and batch.starts:
        plans = plan_kinds(batch, kinds, block_size)
        return {name: ListedStep(plan) for name, plan in plans.items()}
    return {
        name: PlacedStep(batch.places, turn_of(batch.positions, kind))
        for name, kind in kinds.items()
    }


class ListedStep:
    """By the row lists of a plan."""

    def __init__(self, plan: KindPlan) -> None:
        self._plan = plan

    def attend(
        self, qkv: Sums, heads: Heads, state: KeyValues, gate: Tensor | None, wanted: RowInput
    ) -> Rows:
        plan, writes = self._plan, self._plan.writes
        q, k, v = turn_heads(whole_sums(qkv), heads, plan.turn)
        k, v = k.flatten(1), v.flatten(1)
        if plan.look_back is None:
            write_rows_(state.k, writes.rows, k, writes.tokens)
            write_rows_(state.v, writes.rows, v, writes.tokens)
            keys, values = state.k, state.v
        else:
            keys = recent_rows(state.k, plan.look_back, k)
            values = recent_rows(state.v, plan.look_back, v)
        shape = (-1, heads.num_kv_heads, heads.head_dim)
        o = attend_dense(
            q, keys.view(shape), values.view(shape), plan.keys, heads.scale, plan.window, heads.sink
        )
        if plan.look_back is not None:
            write_rows_(state.k, writes.rows, k, writes.tokens)
            write_rows_(state.v, writes.rows, v, writes.tokens)
        if gate is not None:
            o = o * gate.float().sigmoid().to(o.dtype).unsqueeze(-1)
        return o.flatten(1)


class PlacedStep:
    """By addresses on the device."""

    def __init__(self, places: Places, turn: Turn) -> None:
        self._places = places
        self._turn = turn

    def attend(
        self, qkv: Sums, heads: Heads, state: KeyValues, gate: Tensor | None, wanted: RowInput
    ) -> Rows:
        shape = (-1, heads.num_kv_heads, heads.head_dim)
        return attend_heads(
            qkv,
            heads,
            self._turn,
            state.k.view(shape),
            state.v.view(shape),
            self._places,
            gate,
            wanted.scaling,
            wanted.static_scale,
        )
