"""What tests share: few threads, fixed seeds, no variables of ours, GPU tests only on GPUs."""

import os
from collections.abc import Iterator

# before torch is first imported: the suite shares few cores with the processes it starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in [name for name in os.environ if name.startswith("SCISSION_")]:
    del os.environ[name]

import random  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "scission",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("scission")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [
        item for item in items if {"gpu", "multi_gpu"} & {m.name for m in item.iter_markers()}
    ]
    if not marked:
        return
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in marked:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if num_devices < needed:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {needed} device(s), found {num_devices}")
            )


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """The same random numbers in every run and order of tests; torch's only where it is loaded."""
    import sys

    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
