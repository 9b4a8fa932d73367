"""Dense models through the kernels of a GPU: as near to fp32 as a CPU's bfloat16 is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.config import ModelOptions
from scission.common.model.load import LoadedModel, load_model
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.one_process import CPU, OneProcess, load_deployed

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
# widths that the kernels take
_HEADS = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, **_HEADS}
_SLIDING = {
    "attention_type": "sliding_attention",
    "num_attention_heads": 6,
    "num_attention_groups": 2,
    "head_dim": 128,
    "true_head_dim": 128,
}
CONFIGS = {
    "qwen3": qwen3_config(**_SHAPE),
    "ministral3": ministral3_config(**_SHAPE),
    "ministral3-sliding": ministral3_config(**_SHAPE, sliding_window=40),
    "step3p5": step3p5_config(
        hidden_size=256,
        intermediate_size=384,
        head_dim=128,
        attention_other_setting=_SLIDING,
        moe_intermediate_size=128,
        share_expert_dim=128,
    ),
}
# sums in another order round other values
MARGIN = 1.5


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path, CONFIGS[request.param], seed=2)
    return tmp_path


def _logits(loaded: LoadedModel, device: torch.device) -> Tensor:
    """Of prompts in chunks, mixes and single tokens, the same for every model."""
    generator = torch.Generator().manual_seed(4)

    def tokens(count: int) -> list[int]:
        return torch.randint(320, (count,), generator=generator).tolist()

    runner = OneProcess(loaded, device=device)
    sequences = [runner.new_sequence() for _ in range(3)]
    steps = [(130, 40, 1), (70, 1, 200), *[(1, 1, 1)] * 6, (1, 50, 1), (1, 1, 1)]
    results = [
        runner.step(
            [(s, tokens(count)) for s, count in zip(sequences, counts, strict=True)], logits="all"
        )
        for counts in steps
    ]
    return torch.cat(results).float().cpu()


@torch.inference_mode()
def test_a_gpu_is_as_near_to_fp32_as_a_cpus_bfloat16(folder: Path) -> None:
    expected = _logits(load_deployed(folder), CPU)
    deviations = []
    for name, device in (("cpu", CPU), ("cuda", GPU)):
        options = ModelOptions(folder, device=name, dtype="bfloat16", numerics="deployed")
        loaded = load_model(options, device)
        assert loaded.model.captures == (name == "cuda")
        logits = _logits(loaded, device)
        # a token whose router picks another expert deviates by much: the median says more
        rows = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        deviations.append(rows.median().item())
    on_cpu, on_gpu = deviations
    assert on_gpu <= MARGIN * on_cpu
