"""The architectures that are served, by the name that config.json gives them."""

from collections.abc import Mapping
from typing import Any

from scission.common.errors import CheckpointError
from scission.common.model.architecture import Architecture
from scission.common.model.deepseek_v4_architecture import DEEPSEEK_V4
from scission.common.model.ministral3 import MINISTRAL3
from scission.common.model.qwen3 import QWEN3
from scission.common.model.step3p5 import STEP3P5

ARCHITECTURES: Mapping[str, Architecture[Any]] = {
    architecture.name: architecture for architecture in (DEEPSEEK_V4, MINISTRAL3, QWEN3, STEP3P5)
}


def find_architecture(raw: Mapping[str, Any]) -> Architecture[Any]:
    """What a config.json's `architectures` names first.

    Raises:
        CheckpointError: none of ours; lists those that are.
    """
    named = raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if first not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"config.json names the architecture {first!r}; served are {known}")
    return ARCHITECTURES[str(first)]
