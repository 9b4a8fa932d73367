"""From a folder to a model: what is refused, what the digest tells apart, what the state weighs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scission.common.cache.layout import Kind, first_mismatch
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.config import ModelOptions
from scission.common.errors import CheckpointError, ConfigError
from scission.common.layers.numerics import Numerics
from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.config import parse_config
from scission.common.model.deepseek_v4 import layer_groups
from scission.common.model.deepseek_v4_state import cache_layout
from scission.common.model.load import LoadedModel, load_model
from tests.one_process import CPU, OneProcess
from tests.reference_checkpoint import tiny_config

BF16 = Numerics(torch.bfloat16, rounds=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(eos_token_id=[1, 7]), seed=5)
    return directory


def _load(directory: Path, **options: Any) -> LoadedModel:
    return load_model(ModelOptions(directory, device="cpu", **options), CPU)


def test_loaded_model_knows_its_bounds_and_ends(checkpoint: Path) -> None:
    loaded = _load(checkpoint, max_model_len=4096, served_model_name=("a", "b"))
    assert (loaded.vocab_size, loaded.max_model_len, loaded.bos_token_id) == (320, 4096, 0)
    assert loaded.eos_token_ids == {1, 7}
    assert loaded.name == "a"
    assert loaded.layout is loaded.model.layout


def test_an_unknown_architecture_is_refused_with_the_known_ones(
    checkpoint: Path, tmp_path: Path
) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["OtherModel"]}))
    with pytest.raises(CheckpointError, match=r"'OtherModel'.*DeepseekV4ForCausalLM"):
        _load(tmp_path)


def test_more_context_than_the_model_has_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 2000000"):
        _load(checkpoint, max_model_len=2_000_000)


def test_dummy_weights_compute(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    loaded = _load(tmp_path, load_format="dummy", seed=3)
    runner = OneProcess(loaded, max_seqs=1)
    assert runner.prefill(runner.new_sequence(), [1, 2, 3, 4, 5]).isfinite().all()


def test_bfloat16_computes_close_to_float32(checkpoint: Path) -> None:
    logits = []
    for dtype in ("float32", "bfloat16"):
        loaded = _load(checkpoint, dtype=dtype, numerics="deployed")
        assert loaded.layout.component("window_kv").dtype == dtype
        runner = OneProcess(loaded, max_seqs=1)
        sequence = runner.new_sequence()
        # few tokens: a random model amplifies rounding with depth and length
        runner.prefill(sequence, [5, 9, 11, 200])
        logits.append(runner.step([(sequence, [17])]).log_softmax(-1))
    assert (logits[0] - logits[1]).abs().mean() < 0.5


def test_digest_names_what_differs(checkpoint: Path, tmp_path: Path) -> None:
    base = _load(checkpoint).digest
    assert first_mismatch(base, _load(checkpoint, served_model_name=("other",)).digest) is None
    assert first_mismatch(base, _load(checkpoint, numerics="exact").digest) == "numerics"
    other_dtype = _load(checkpoint, dtype="bfloat16").digest
    differing = {name for name in base if base[name] != other_dtype[name]}
    assert differing == {"components", "kv_dtype", "numerics"}
    other_block = load_model(ModelOptions(checkpoint, device="cpu"), CPU, block_size=256).digest
    assert {name for name in base if base[name] != other_block[name]} == {
        "block_size",
        "components",
    }
    write_random_deepseek_v4(tmp_path, tiny_config(eos_token_id=[1, 7]), seed=6)
    assert first_mismatch(base, _load(tmp_path).digest) == "weights_revision"
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with_tokenizer = _load(checkpoint, tokenizer=tmp_path).digest
    assert first_mismatch(base, with_tokenizer) == "tokenizer"


def test_larger_blocks_compute_the_same(checkpoint: Path) -> None:
    prompt = [(5 * i) % 320 for i in range(300)]
    logits = []
    for block_size in (128, 256):
        loaded = load_model(ModelOptions(checkpoint, device="cpu"), CPU, block_size=block_size)
        runner = OneProcess(loaded, max_seqs=1)
        logits.append(runner.prefill(runner.new_sequence(), prompt))
    assert torch.equal(*logits)


def test_layer_groups_are_even_and_cover_all_layers() -> None:
    assert layer_groups(6) == ((0, 1), (1, 3), (3, 4), (4, 6))
    assert layer_groups(2) == ((0, 1), (1, 2))
    sizes = {last - first for first, last in layer_groups(61)}
    assert sizes == {15, 16}


def test_each_layer_group_is_reported_once_its_rows_are_final(checkpoint: Path) -> None:
    loaded = _load(checkpoint)
    runner = OneProcess(loaded, max_seqs=1)
    sequence = runner.new_sequence()
    storage = runner.storage
    seen: list[tuple[int, int]] = []
    copies: dict[str, torch.Tensor] = {}

    def on_layers(first: int, last: int) -> None:
        seen.append((first, last))
        for component in loaded.layout.paged:
            for i, layer in enumerate(component.layers):
                if first <= layer < last:
                    copies[f"{component.name}.{layer}"] = storage.paged[component.name][i].clone()

    chunk = SequenceChunk([(3 * i) % 320 for i in range(200)], 0, sequence.block_ids, sequence.slot)
    loaded.model.forward(build_batch([chunk], CPU), storage, on_layers)
    assert tuple(seen) == loaded.model.layer_groups
    for component in loaded.layout.paged:
        for i, layer in enumerate(component.layers):
            final = storage.paged[component.name][i]
            assert torch.equal(copies[f"{component.name}.{layer}"], final)
            assert final[1:].any()


PRO = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_groups": 16,
    "sliding_window": 128,
    "compress_ratios": [128, 128, *([4, 128] * 30)[:59], 0],
    "index_head_dim": 128,
    "index_topk": 1024,
    "num_hash_layers": 3,
}
FLASH = PRO | {
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "o_groups": 8,
    "compress_ratios": [0, 0, *([4, 128] * 21)[:41], 0],
}


@pytest.mark.parametrize(
    ("sizes", "layers", "ring_bytes", "entry_bytes_per_token"),
    [
        # of the specification's tables: full rings, and asymptotic bytes per prompt token (bf16)
        (PRO, (30, 31), 30 * (65536 + 16384) + 31 * 524288, 9848),
        (FLASH, (21, 20), 21 * (65536 + 16384) + 20 * 524288, 6880),
    ],
    ids=["Pro", "Flash"],
)
def test_state_weighs_what_the_specification_says(
    sizes: dict[str, Any], layers: tuple[int, int], ring_bytes: int, entry_bytes_per_token: int
) -> None:
    config = parse_config(tiny_config(**sizes))
    layout = cache_layout(config, BF16)
    assert tuple(len(layout.component(name).layers) for name in ("csa_kv", "hca_kv")) == layers
    window_bytes = config.num_hidden_layers * 128 * 1024
    assert layout.slot_bytes == window_bytes + ring_bytes
    assert layout.block_bytes == 128 * entry_bytes_per_token


def test_only_live_rows_are_shipped() -> None:
    layout = cache_layout(parse_config(tiny_config(**PRO)), BF16)
    rows = {c.name: c.shipped_rows(261) for c in layout.components}
    assert rows == {
        "window_kv": (134, 261),
        "csa_kv": (0, 65),
        "csa_index": (0, 65),
        "hca_kv": (0, 2),
        "csa_kv_state": (256, 261),
        "csa_score_state": (256, 261),
        "index_kv_state": (256, 261),
        "index_score_state": (256, 261),
        "hca_kv_state": (256, 261),
        "hca_score_state": (256, 261),
    }
    assert layout.component("csa_score_state").initial == float("-inf")
    assert all(c.kind is not Kind.TAIL for c in layout.components)


def test_a_model_without_a_ratio_has_no_state_of_it() -> None:
    config = parse_config(tiny_config(num_hidden_layers=2, compress_ratios=[0, 4, 0]))
    names = {c.name for c in cache_layout(config, BF16).components}
    assert not any(name.startswith("hca") for name in names) and "csa_kv" in names
