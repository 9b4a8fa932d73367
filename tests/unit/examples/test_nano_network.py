"""The network that is trained and the model that is served are one function."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.nano.data.rows import RowMaker, nano_tokenizer
from examples.nano.export import PAD_ID, checkpoint_tensors, read_checkpoint, write_checkpoint
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
from scission.common.model.deepseek_v4 import DeepseekV4
from scission.common.model_source import BUNDLED
from scission.kernels.quant import (
    dequantize_block_fp8,
    dequantize_group_fp4,
    quantize_block_fp8,
    quantize_group_fp4,
    round_trip_fp4,
    round_trip_fp8,
)
from tests.one_process import CPU, OneProcess, load_deployed, load_exact

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
    model = process.loaded.model
    assert isinstance(model, DeepseekV4)
    sequence = process.new_sequence()
    logits = process.step([(sequence, ids)], logits="all")
    with torch.inference_mode():
        process.storage.reset_slot(sequence.slot)
        chunk = SequenceChunk(ids, 0, sequence.block_ids, sequence.slot, "all")
        streams = model.run_layers(build_batch([chunk], CPU), process.storage)
        following = SequenceChunk([*ids[1:], ids[0]], 0, sequence.block_ids, sequence.slot, "all")
        draft = model.draft_logits(streams, build_batch([following], CPU))
    return logits, draft


def trained(p: Parameters, ids: list[int], *, rounds: bool) -> tuple[torch.Tensor, torch.Tensor]:
    net = Network(CONFIG, Roundings(torch.float32, activations=rounds), CPU)
    with torch.no_grad():
        weights = rounded_weights(p, net.roundings)
        out = net(weights, torch.tensor([ids]), is_sparse=True)
        assert out.draft is not None
        return F.linear(out.state, p["head"]), F.linear(out.draft, p["head"])


def random_ids(seed: int = 9, length: int = LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 900, (length,), generator=generator).tolist()


def relative_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).norm(dim=-1) / b.norm(dim=-1)


def test_the_trained_network_gives_the_served_models_logits(
    written: tuple[Path, Parameters],
) -> None:
    folder, p = written
    ids = random_ids()
    logits, draft = served(OneProcess(load_exact(folder)), ids)
    own_logits, own_draft = trained(p, ids, rounds=False)
    for own, other in ((own_logits, logits), (own_draft, draft)):
        # past position 255 the indexer chooses, of equal scores (zeros among them) the first
        assert relative_distances(own, other).max() < 1e-4


def test_rounded_activations_are_the_deployed_numerics(written: tuple[Path, Parameters]) -> None:
    folder, p = written
    near, far, num_leading = [], [], []
    for seed in (9, 10, 11):
        ids = random_ids(seed)
        exact, _ = served(OneProcess(load_exact(folder)), ids)
        logits, _ = served(OneProcess(load_deployed(folder)), ids)
        own_logits, _ = trained(p, ids, rounds=True)
        near.append(relative_distances(own_logits, logits))
        far.append(relative_distances(exact, logits))
        num_leading.append(int((near[-1] < 1e-5).int().cumprod(0).sum()))
    # equal until a value on a rounding boundary falls to the other side, for sums are taken in
    # another order; a random model amplifies that from there on
    assert min(num_leading) >= 12
    assert torch.cat(near).median() < 0.3 * torch.cat(far).median()


def test_the_bundled_model_answers_in_training_as_it_does_served() -> None:
    p = read_checkpoint(BUNDLED)
    for seed, length in ((1, 512), (2, 1024)):
        row, mask = RowMaker(nano_tokenizer(), seed).row(length)
        ids, said = row.tolist(), torch.from_numpy(mask)
        logits, draft = served(OneProcess(load_deployed(BUNDLED), max_tokens=length), ids)
        own_logits, own_draft = trained(p, ids, rounds=True)
        assert torch.equal(own_logits.argmax(-1)[said], logits.argmax(-1)[said])
        both = said & said.roll(-1)
        assert torch.equal(own_draft.argmax(-1)[both], draft.argmax(-1)[both])
        assert torch.equal(logits.argmax(-1)[said], torch.tensor(ids).roll(-1)[said])


def test_training_rounds_as_inference_does() -> None:
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(3))
    assert torch.equal(round_fp8(x, 128), round_trip_fp8(x, 128, 1e-4))
    assert torch.equal(round_fp4(x, 32), round_trip_fp4(x, 32))
    w = torch.randn(3, 192, 160, generator=torch.Generator().manual_seed(4))
    assert torch.equal(round_fp4(w, 32), dequantize_group_fp4(*quantize_group_fp4(w)))
    assert torch.equal(
        round_fp8_matrix(w), dequantize_block_fp8(*quantize_block_fp8(w), offset=(0, 0))
    )
