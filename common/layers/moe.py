"""Mixture of experts: routers, the routed experts, and the shared expert among them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.common.checkpoint.weights import Matrix, Weights
from scission.common.layers.linear import Linear, axis_shard
from scission.common.layers.numerics import LINEAR_BLOCK, Numerics
from scission.common.parallel.ranks import Axis
from scission.kernels.moe import (
    ExpertWeights,
    Fp4ExpertWeights,
    can_run_fp4,
    gate,
    route,
    run_experts,
    run_fp4_experts,
)
from scission.kernels.quant import round_trip_fp8


class ScoreRouter:
    """The top_k experts by score plus bias; fp32."""

    def __init__(self, w: Weights, dim: int, num_experts: int, top_k: int, scaling: float) -> None:
        self._weight = w.tensor("weight", (num_experts, dim), torch.bfloat16).float()
        self._bias = w.tensor("bias", (num_experts,), torch.float32)
        self._top_k = top_k
        self._scaling = scaling

    def __call__(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, dim] -> experts [num_tokens, top_k] int64 and weights float32."""
        logits = F.linear(x.float(), self._weight)
        return route(logits, self._bias, self._top_k, self._scaling)


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
        self._weight = w.tensor("weight", (num_experts, dim), torch.bfloat16).float()
        self._experts_of = w.tensor("tid2eid", (vocab_size, top_k), torch.int64)
        self._scaling = scaling

    def __call__(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, dim] -> experts [num_tokens, top_k] int64 and weights float32."""
        experts = self._experts_of.index_select(0, token_ids)
        logits = F.linear(x.float(), self._weight)
        return experts, gate(logits, experts, self._scaling)


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


class Fp4ExpertStack:
    """Gated experts that stay FP4 codes in memory; deployed numerics in bfloat16."""

    def __init__(self, w1: Matrix, w2: Matrix, w3: Matrix, limit: float) -> None:
        """
        Args:
            w1, w2, w3: stacked matrices [experts, out, in].
            limit: of the activation.
        """
        self._weights = Fp4ExpertWeights(*(_stored(matrix) for matrix in (w1, w3, w2)))
        self._limit = limit

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim] float32: as `ExpertStack` without shared ones."""
        return run_fp4_experts(x, experts, weights, self._weights, self._limit)


class CodedExpert:
    """One expert that every token takes, of matrices that stay codes in memory."""

    def __init__(
        self, w1: Matrix, w2: Matrix, w3: Matrix, limit: float, numerics: Numerics
    ) -> None:
        self._gate_up = Linear([w1, w3], numerics)
        self._down = Linear([w2], numerics)
        self._limit = limit

    def apply_to_all(self, x: Tensor) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim] float32."""
        a, b = self._gate_up(x).float().chunk(2, dim=-1)
        # the gate is clipped from above only
        inner = F.silu(a.clamp(max=self._limit)).mul_(b.clamp(-self._limit, self._limit))
        return self._down(inner.to(x.dtype)).float()


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
        self._experts: ExpertStack | Fp4ExpertStack
        self._shared: ExpertStack | CodedExpert | None = None
        if (
            w1.kind == "fp4_group"
            and numerics.rounds
            and can_run_fp4(w.device, numerics.dtype, dim, inner)
        ):
            self._experts = Fp4ExpertStack(w1, w2, w3, limit)
            self._shared = CodedExpert(shared_w1, shared_w2, shared_w3, limit, numerics)
        elif axis.size == 1 and _rounds(w1, numerics) == _rounds(shared_w1, numerics):
            self._experts = ExpertStack(
                (w1, shared_w1), (w2, shared_w2), (w3, shared_w3), limit, numerics, num_shared=1
            )
        else:
            self._experts = ExpertStack((w1,), (w2,), (w3,), limit, numerics)
            self._shared = ExpertStack((shared_w1,), (shared_w2,), (shared_w3,), limit, numerics)

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim]; routed and shared are summed in fp32, cast once.

        Args:
            token_ids: [num_tokens] int64, which hash routing goes by.
        """
        experts, weights = self._router(x, token_ids)
        if self._shared is None:
            return self._experts(x, experts, weights).to(self._dtype)
        if self._axis.size > 1:
            experts = experts - self._first
            is_mine = (experts >= 0) & (experts < self._num_local)
            experts, weights = experts * is_mine, weights * is_mine
        total = self._axis.all_reduce(self._experts(x, experts, weights))
        return (total + self._shared.apply_to_all(x)).to(self._dtype)


def _rounds(matrix: Matrix, numerics: Numerics) -> bool:
    return numerics.rounds and matrix.kind != "plain"


def _stored(matrix: Matrix) -> tuple[Tensor, Tensor]:
    assert matrix.scales is not None
    return matrix.codes, matrix.scales.view(torch.uint8)
