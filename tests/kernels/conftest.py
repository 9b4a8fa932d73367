"""Where Triton kernels run in these tests: a GPU, or the interpreter's CPU."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from scission.kernels.target import TARGETS, Target, target_of
from scission.kernels.testing import poisoned_empties

if knobs.runtime.interpret:
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: type[tl.tensor], scope: Any) -> None:
        """Loop bounds are arrays of one element, of which numpy 2.4 makes no int for triton 3.6."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@pytest.fixture
def kernel_device() -> torch.device:
    """Skips where kernels run on nothing; `test_interpreter` runs the skipped tests."""
    if knobs.runtime.interpret:
        return torch.device("cpu")
    if torch.cuda.is_available() and target_of(torch.device("cuda", 0)) is not None:
        return torch.device("cuda", 0)
    pytest.skip("needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture(params=["codes", "decoded"])
def kernel_target(request: pytest.FixtureRequest, kernel_device: torch.device) -> Target:
    """The device's own target, with FP8 dots where it has them, and without."""
    has_fp8_dot = request.param == "codes"
    own = target_of(kernel_device)
    if own is None:
        # the interpreter multiplies the bits of bf16
        gfx942 = next(target for target in TARGETS if target.name == "gfx942")
        return replace(gfx942, has_fp8_dot=has_fp8_dot, decoded="float32")
    if has_fp8_dot and not own.has_fp8_dot:
        pytest.skip(f"{own.name} has no FP8 dot")
    return replace(own, has_fp8_dot=has_fp8_dot)


@pytest.fixture
def poisoned() -> Iterator[None]:
    with poisoned_empties():
        yield
