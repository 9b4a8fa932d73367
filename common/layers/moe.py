"""Mixture of experts: routers, the routed experts, and the shared expert among them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.common.checkpoint.weights import Matrix, Weights
from scission.common.layers.linear import axis_shard
from scission.common.layers.numerics import LINEAR_BLOCK, Numerics
from scission.common.parallel.ranks import Axis
from scission.kernels.linear import QuantizedRows
from scission.kernels.moe import ExpertOutputs, ExpertWeights, gate, route, run_experts
from scission.kernels.quant import round_trip_fp8
from scission.kernels.target import target_of

if TYPE_CHECKING:
    # needs Triton, which only a device does
    from scission.common.layers.coded_moe import CodedMoE
    from scission.kernels.moe.choose_experts import Routing


class ScoreRouter:
    """The top_k experts by score plus bias; fp32."""

    def __init__(self, w: Weights, dim: int, num_experts: int, top_k: int, scaling: float) -> None:
        self._stored = w.tensor("weight", (num_experts, dim), torch.bfloat16)
        self._weight = self._stored.float()
        self._bias = w.tensor("bias", (num_experts,), torch.float32)
        self._top_k = top_k
        self._scaling = scaling

    def __call__(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, dim] -> experts [num_tokens, top_k] int64 and weights float32."""
        logits = F.linear(x.float(), self._weight)
        return route(logits, self._bias, self._top_k, self._scaling)

    def routing(self, first: int, num_local: int) -> "Routing":
        """The same for kernels, of which [first, first + num_local) are here."""
        from scission.kernels.moe.choose_experts import Routing

        k, scaling = self._top_k, self._scaling
        return Routing(self._stored, self._bias, None, k, scaling, "sqrtsoftplus", first, num_local)


class HashRouter:
    """The experts that a table gives each token id; the weights are the router's."""

    def __init__(
        self,
        w: Weights,
        dim: int,
        num_experts: int,
        top_k: int,
        scaling: float,
        vocab_size: int,
    ) -> None:
        self._stored = w.tensor("weight", (num_experts, dim), torch.bfloat16)
        self._weight = self._stored.float()
        self._experts_of = w.tensor("tid2eid", (vocab_size, top_k), torch.int64)
        self._scaling = scaling

    def __call__(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, dim] -> experts [num_tokens, top_k] int64 and weights float32."""
        experts = self._experts_of.index_select(0, token_ids)
        logits = F.linear(x.float(), self._weight)
        return experts, gate(logits, experts, self._scaling)

    def routing(self, first: int, num_local: int) -> "Routing":
        """The same for kernels, of which [first, first + num_local) are here."""
        from scission.kernels.moe.choose_experts import Routing

        table, scaling = self._experts_of, self._scaling
        return Routing(
            self._stored, None, table, table.shape[1], scaling, "sqrtsoftplus", first, num_local
        )


class ExpertStack:
    """Gated feed-forward experts of one shape."""

    def __init__(
        self,
        w1: Sequence[Matrix],
        w2: Sequence[Matrix],
        w3: Sequence[Matrix],
        limit: float,
        numerics: Numerics,
        num_shared: int = 0,
    ) -> None:
        """
        Args:
            w1, w2, w3: stacked matrices [experts, out, in], or single ones, in order of expert.
            limit: of the activation.
            num_shared: the last experts, which every token takes.
        """
        self._matrices = (tuple(w1), tuple(w2), tuple(w3))
        self._limit = limit
        self._num_shared = num_shared
        self._dtype = numerics.dtype
        self._round_block = LINEAR_BLOCK if _rounds(w1[0], numerics) else None
        is_kept = w1[0].codes.device.type == "cpu"
        self._values = self._decode() if is_kept else None
        if is_kept:
            self._matrices = ((), (), ())

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim] float32: the given experts and the shared ones.

        Args:
            experts: [num_tokens, k] int64, numbers in this stack; `weights`: float32.
        """
        values = self._values if self._values is not None else self._decode()
        if self._round_block is not None:
            x = round_trip_fp8(x, self._round_block)
        return run_experts(
            x, experts, weights, values, self._limit, self._round_block, self._num_shared
        )

    def apply_to_all(self, x: Tensor) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim] float32: the first expert, for every token."""
        experts = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        return self(x, experts, torch.ones_like(experts, dtype=torch.float32))

    def _decode(self) -> ExpertWeights:
        w1, w2, w3 = (
            torch.cat(
                [m.dequantize(self._dtype).view(-1, m.out_features, m.in_features) for m in parts]
            )
            for parts in self._matrices
        )
        return ExpertWeights(w1, w3, w2)


class MoE:
    """Router, routed experts and one shared expert; expert parallel by contiguous ranges.

    Where it can be, the shared expert is the last one of the stack.
    """

    def __init__(
        self,
        w: Weights,
        router: ScoreRouter | HashRouter,
        dim: int,
        inner: int,
        num_experts: int,
        limit: float,
        axis: Axis,
        numerics: Numerics,
    ) -> None:
        names = [f"experts.{expert}" for expert in range(num_experts)]
        shard = axis_shard(axis, 0)
        w1, w2, w3 = (
            w.experts([f"{name}.{part}" for name in names], *shape, shard)
            for part, shape in (("w1", (inner, dim)), ("w2", (dim, inner)), ("w3", (inner, dim)))
        )
        shared = w.scope("shared_experts")
        shared_w1, shared_w2, shared_w3 = (
            shared.matrix("w1", inner, dim),
            shared.matrix("w2", dim, inner),
            shared.matrix("w3", inner, dim),
        )
        self._router = router
        self._axis = axis
        self._first, last = shard.bounds(num_experts) if shard else (0, num_experts)
        self._num_local = last - self._first
        self._dtype = numerics.dtype
        self._experts: ExpertStack | None = None
        self._shared: ExpertStack | None = None
        self._coded: CodedMoE | None = None
        if numerics.rounds and _has_kernels(w1, shared_w1, numerics.dtype):
            from scission.common.layers import coded_moe

            self._coded = coded_moe.CodedMoE(
                router.routing(self._first, self._num_local),
                (w1, w2, w3),
                (shared_w1, shared_w2, shared_w3),
                limit,
                axis,
            )
        elif axis.size == 1 and _rounds(w1, numerics) == _rounds(shared_w1, numerics):
            self._experts = ExpertStack(
                (w1, shared_w1), (w2, shared_w2), (w3, shared_w3), limit, numerics, num_shared=1
            )
        else:
            self._experts = ExpertStack((w1,), (w2,), (w3,), limit, numerics)
            self._shared = ExpertStack((shared_w1,), (shared_w2,), (shared_w3,), limit, numerics)

    def __call__(self, x: Tensor | QuantizedRows, token_ids: Tensor) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim]; routed and shared are summed in fp32, cast once.

        Args:
            x: quantised rows keep their `values`.
            token_ids: [num_tokens] int64, which hash routing goes by.
        """
        y = self.unsummed(x, token_ids)
        return y.sum(self._dtype) if isinstance(y, ExpertOutputs) else y

    def unsummed(
        self, x: Tensor | QuantizedRows, token_ids: Tensor, positions: Tensor | None = None
    ) -> Tensor | ExpertOutputs:
        """The same as `hc_write` takes it: where it can be, the sum is left to who reads it.

        Args:
            positions: [num_tokens] int64; padding, at -1, need not take experts.
        """
        if self._coded is not None:
            return self._coded(x, token_ids, positions)
        if isinstance(x, QuantizedRows):
            assert x.values is not None, "the router reads rows that are not rounded"
            x = x.values
        assert self._experts is not None
        experts, weights = self._router(x, token_ids)
        if self._shared is None:
            return self._experts(x, experts, weights).to(self._dtype)
        if self._axis.size > 1:
            experts = experts - self._first
            is_mine = (experts >= 0) & (experts < self._num_local)
            experts, weights = experts * is_mine, weights * is_mine
        total = self._axis.all_reduce(self._experts(x, experts, weights))
        return (total + self._shared.apply_to_all(x)).to(self._dtype)


def _has_kernels(routed: Matrix, shared: Matrix, dtype: torch.dtype) -> bool:
    if target_of(routed.codes.device) is None:
        return False
    from scission.common.layers.coded_moe import can_run_coded

    return can_run_coded(routed, shared, dtype)


def _rounds(matrix: Matrix, numerics: Numerics) -> bool:
    return numerics.rounds and matrix.kind != "plain"
