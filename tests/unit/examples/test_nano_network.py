"""The network that is trained and the model that is served are one function."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.nano.export import PAD_ID, checkpoint_tensors, write_checkpoint
from examples.nano.network import (
    Network,
    Parameters,
    Roundings,
    initial_parameters,
    round_fp4,
    round_fp8,
    round_fp8_matrix,
    rounded_weights,
)
from examples.nano.shape import CONFIG
from scission.common.checkpoint.deepseek_v4 import tensor_table
from scission.common.model.batch import SequenceChunk, build_batch
from scission.kernels.quant import (
    dequantize_block_fp8,
    dequantize_group_fp4,
    quantize_block_fp8,
    quantize_group_fp4,
    round_trip_fp4,
    round_trip_fp8,
)
from tests.one_process import OneProcess, load_deployed, load_exact

LENGTH = 384  # more entries than the indexer keeps


def unlike_parameters() -> Parameters:
    """Nothing that training starts from as zero or one is left so; bf16 what is stored so."""
    generator = torch.Generator().manual_seed(5)
    p = initial_parameters(CONFIG, generator)
    for w in p.values():
        if w.is_floating_point():
            w += 0.1 * torch.randn(w.shape, generator=generator)
    p["gate_bias"] *= 0.2
    p["head"] *= 3
    p["head"][CONFIG["bos_token_id"]] = p["head"][PAD_ID]  # the export makes it so
    return p


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parameters]:
    folder = tmp_path_factory.mktemp("nano")
    p = unlike_parameters()
    write_checkpoint(folder, p)
    table = tensor_table(CONFIG)
    stored = {id(t): name for name, t in checkpoint_tensors(p, CONFIG).items()}
    assert len(stored) > 100
    for name in (
        "embed", "head", "norm", "attn_norm", "ffn_norm", "q_norm", "kv_norm", "gate", "csa_norm",
        "hca_norm", "index_norm", "csa_wkv", "csa_wgate", "hca_wkv", "hca_wgate", "index_wkv",
        "index_wgate", "index_weights_proj", "enorm", "hnorm", "mtp_norm",
    ):  # fmt: skip
        p[name] = p[name].to(torch.bfloat16).float()
    assert table["embed.weight"].dtype == "BF16"
    return folder, p


def served(process: OneProcess, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every position, and of the draft layer."""
    sequence = process.new_sequence()
    model = process.loaded.model
    chunk = SequenceChunk(ids, 0, sequence.block_ids, sequence.slot, "all")
    with torch.inference_mode():
        batch = build_batch([chunk], torch.device("cpu"))
        streams = model.run_layers(batch, process.storage)  # type: ignore[attr-defined]
        logits = model._logits(streams)  # type: ignore[attr-defined]
        following = SequenceChunk([*ids[1:], ids[0]], 0, sequence.block_ids, sequence.slot, "all")
        draft = model.draft_logits(  # type: ignore[attr-defined]
            streams, build_batch([following], torch.device("cpu"))
        )
    return logits, draft


def trained(p: Parameters, ids: list[int], *, rounds: bool) -> tuple[torch.Tensor, torch.Tensor]:
    net = Network(CONFIG, Roundings(torch.float32, activations=rounds), torch.device("cpu"))
    with torch.no_grad():
        weights = rounded_weights(p, net.roundings)
        out = net(weights, torch.tensor([ids]), is_sparse=True)
        assert out.draft is not None
        return F.linear(out.state, p["head"]), F.linear(out.draft, p["head"])


def random_ids() -> list[int]:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(3, 900, (LENGTH,), generator=generator).tolist()


def test_the_trained_network_gives_the_served_models_logits(
    written: tuple[Path, Parameters],
) -> None:
    folder, p = written
    ids = random_ids()
    logits, draft = served(OneProcess(load_exact(folder)), ids)
    own_logits, own_draft = trained(p, ids, rounds=False)
    for own, other in ((own_logits, logits), (own_draft, draft)):
        distances = (own - other).abs().amax(-1) / other.abs().max()
        # up to here every entry is attended to
        assert distances[:256].max() < 1e-4
        # equal index scores (zeros among them) may be chosen otherwise at the boundary of the best
        assert distances[256:].median() < 1e-3


def test_rounded_activations_are_the_deployed_numerics(written: tuple[Path, Parameters]) -> None:
    folder, p = written
    ids = random_ids()
    exact, _ = served(OneProcess(load_exact(folder)), ids)
    logits, _ = served(OneProcess(load_deployed(folder)), ids)
    own_logits, _ = trained(p, ids, rounds=True)
    # a value on a rounding boundary may fall to either side, which a random model amplifies
    distance = (own_logits - logits).norm() / logits.norm()
    assert distance < 0.5 * (exact - logits).norm() / logits.norm()


def test_training_rounds_as_inference_does() -> None:
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(3))
    assert torch.equal(round_fp8(x, 128), round_trip_fp8(x, 128, 1e-4))
    assert torch.equal(round_fp4(x, 32), round_trip_fp4(x, 32))
    w = torch.randn(3, 192, 160, generator=torch.Generator().manual_seed(4))
    assert torch.equal(round_fp4(w, 32), dequantize_group_fp4(*quantize_group_fp4(w)))
    assert torch.equal(
        round_fp8_matrix(w), dequantize_block_fp8(*quantize_block_fp8(w), offset=(0, 0))
    )
