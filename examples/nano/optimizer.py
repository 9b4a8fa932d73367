"""Muon for matrices, Adam for the rest; both over stacks of layers at once."""

import torch
from torch import Tensor

from examples.nano.network import FORMATS, Parameters

FIXED = ("gate_bias", "tid2eid")  # no gradient: balanced by rule, or drawn once
_MATRICES = (*FORMATS, "csa_wkv", "csa_wgate", "hca_wkv", "hca_wgate", "index_wkv", "index_wgate")


def orthogonalised(matrices: Tensor) -> Tensor:
    """[.., out, in] -> the nearest semi-orthogonal ones, roughly: five Newton-Schulz steps."""
    x = matrices.to(torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        squares = x @ x.mT
        x = 3.4445 * x + (-4.7750 * squares + 2.0315 * squares @ squares) @ x
    return x.mT if is_tall else x


class Optimizer:
    """Momentum and second moments in fp32, in `state`, by the parameter's name."""

    def __init__(self, p: Parameters, muon_rate: float, adam_rate: float) -> None:
        self.state: dict[str, Tensor] = {}
        self.num_steps = 0
        self._muon_rate, self._adam_rate = muon_rate, adam_rate
        for name, w in p.items():
            if name in FIXED:
                continue
            self.state[f"{name}.first"] = torch.zeros_like(w)
            if name not in _MATRICES:
                self.state[f"{name}.second"] = torch.zeros_like(w)

    @torch.no_grad()
    def step(self, p: Parameters, share: float) -> None:
        """One step of all parameters from their gradients, at a share of the full rates."""
        self.num_steps += 1
        t = self.num_steps
        muon, adam = [], []
        for name, w in p.items():
            if name not in FIXED and w.grad is not None:
                (muon if name in _MATRICES else adam).append((name, w))
        for name, w in muon:
            assert w.grad is not None
            momentum = self.state[f"{name}.first"]
            momentum.lerp_(w.grad, 0.05)
            update = orthogonalised(w.grad.lerp(momentum, 0.95))
            rate = self._muon_rate * share
            w.mul_(1 - 0.02 * rate).add_(
                update.to(w.dtype), alpha=-rate * max(1.0, w.shape[-2] / w.shape[-1]) ** 0.5
            )
        weights = [w for _, w in adam]
        grads = [w.grad for w in weights if w.grad is not None]
        first = [self.state[f"{name}.first"] for name, _ in adam]
        second = [self.state[f"{name}.second"] for name, _ in adam]
        torch._foreach_lerp_(first, grads, 0.1)
        torch._foreach_mul_(second, 0.98)
        torch._foreach_addcmul_(second, grads, grads, 0.02)
        sizes = torch._foreach_sqrt(second)
        torch._foreach_div_(sizes, (1 - 0.98**t) ** 0.5)
        torch._foreach_add_(sizes, 1e-10)
        rate = self._adam_rate * share / (1 - 0.9**t)
        torch._foreach_addcdiv_(weights, first, sizes, value=-rate)
        for _, w in muon + adam:
            w.grad = None
