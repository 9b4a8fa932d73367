"""A mixture of experts that stay codes in memory: choice, grouping and products on a device.

Needs Triton. Few tokens take three launches: choose, w1 and w3, w2; many more tokens some more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scission.kernels.gated_experts.reference import route_sigmoid
from scission.kernels.linear import QuantizedRows
from scission.kernels.moe import choose_experts, grouped_experts, many_fp4, reference
from scission.kernels.moe.choose_experts import Routing
from scission.kernels.moe.fp4_layout import Fp4Experts
from scission.kernels.moe.group_rows import group_rows
from scission.kernels.moe.grouped_experts import SHARED_SPLIT, Activation, Fp8Experts
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.target import Target


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """One that every token takes with weight 1."""

    w13: Fp8Experts  # of one expert
    w2: Fp8Experts
    limit: float | None  # of its activation


class CodedExperts:
    """Routed experts and, where it is given, a shared one beside them."""

    def __init__(
        self,
        routing: Routing,
        w13: Fp4Experts | Fp8Experts,
        w2: Fp4Experts | Fp8Experts,
        activation: Activation,
        shared: SharedExpert | None,
        target: Target,
    ) -> None:
        """
        Args:
            w13: outputs 2 * inner, gate then up, of the experts that are here.
        """
        self._routing = routing
        self._w13, self._w2 = w13, w2
        self._activation = activation
        self._shared = shared
        self._target = target
        device, inner = w13.codes.device, w2.in_features
        num_counters = grouped_experts.num_counters(
            routing.num_local, choose_experts.MAX_PAIRS, inner
        )
        self._counters = torch.zeros(num_counters, dtype=torch.int32, device=device)
        self._choice_counters = torch.zeros(
            choose_experts.num_counters(), dtype=torch.int32, device=device
        )

    def takes_few(self, num_tokens: int) -> bool:
        """Whether so many tokens run by `run_few`, with the shared expert in the same launches."""
        return choose_experts.can_choose(num_tokens, self._routing.top_k)

    def run_few(
        self, x: QuantizedRows, token_ids: Tensor | None, positions: Tensor | None
    ) -> ExpertOutputs:
        """
        Args:
            x: [num_tokens, dim] with its values, as many as `takes_few`.
            token_ids: [num_tokens] int64, which a table of experts goes by; None: there is none.
            positions: [num_tokens] int64; padding, at -1, takes no expert. None: there is none.
        """
        assert x.values is not None
        routing, shared, target = self._routing, self._shared, self._target
        tile = grouped_experts.tiles(target)[0]
        groups = choose_experts.choose_experts(
            x.values.contiguous(),
            routing,
            token_ids,
            positions,
            tile.block_m,
            SHARED_SPLIT if shared is not None else 0,
            self._choice_counters,
            target,
        )
        return grouped_experts.run_few(
            x,
            groups,
            self._w13,
            self._w2,
            (shared.w13, shared.w2) if shared is not None else None,
            self._activation,
            shared.limit if shared is not None else None,
            self._counters,
            tile,
            target,
        )

    def run_many(self, x: QuantizedRows, token_ids: Tensor | None) -> ExpertOutputs:
        """The routed experts' outputs, of any number of tokens.

        Args:
            x: [num_tokens, dim] with its values.
        """
        assert x.values is not None
        routing, target = self._routing, self._target
        if not x.num_tokens:
            device = x.codes.device
            return ExpertOutputs(
                torch.empty(1, 0, self._w2.out_features, dtype=torch.bfloat16, device=device),
                torch.empty(0, routing.top_k, dtype=torch.int32, device=device),
            )
        experts, weights = self._choose(x.values, token_ids)
        w13, w2, num_local = self._w13, self._w2, routing.num_local
        local = experts - routing.first_expert
        if isinstance(w13, Fp4Experts) and isinstance(w2, Fp4Experts):
            block_m = many_fp4.tile_of(target).block_m
            groups = group_rows(local, weights, num_local, block_m)
            return many_fp4.run_many(x, groups, w13, w2, self._activation, target)
        assert isinstance(w13, Fp8Experts) and isinstance(w2, Fp8Experts)
        tile = grouped_experts.pick_tile(experts.numel(), num_local, target)
        groups = group_rows(local, weights, num_local, tile.block_m)
        return grouped_experts.run_many(x, groups, w13, w2, self._activation, tile, target)

    def _choose(self, x: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        r = self._routing
        if r.gate.dtype == torch.bfloat16 and x.device.type != "cpu":
            logits = torch.mm(x, r.gate.mT, out_dtype=torch.float32)
        else:
            logits = torch.mm(x.float(), r.gate.float().mT)
        if r.table is not None:
            assert token_ids is not None, "a table goes by token ids"
            experts = r.table.index_select(0, token_ids)
            return experts, reference.gate(logits, experts, r.scaling)
        if r.score == "sigmoid":
            return route_sigmoid(logits, r.bias, r.top_k, r.scaling)
        assert r.bias is not None
        return reference.route(logits, r.bias, r.top_k, r.scaling)
