"""The model that is served when none is named: random, tiny, whole, written once into a cache."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scission.common.checkpoint.byte_tokenizer import build_tokenizer, readable_ids
from scission.common.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BUNDLED_NAME = "scission-tiny"
_SEED = 20260424
_HERE = Path(__file__).parent
# a change of any of these is a change of the model
_MADE_BY = (
    Path(__file__),
    _HERE / "bundled_encoding.py",
    _HERE / "byte_tokenizer.py",
    _HERE / "deepseek_v4.py",
    _HERE / "dummy.py",
    _HERE / "write_deepseek_v4.py",
    _HERE.parent.parent / "kernels" / "quant" / "reference.py",
)

# every kind of layer: window only, ratio 128 and ratio 4, by hash and by score, and an MTP layer
BUNDLED_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "compress_ratios": [0, 128, 4, 128, 4, 0, 0],
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 128,
    "num_hash_layers": 2,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 16384,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}


def bundled_checkpoint(cache: Path | None = None) -> Path:
    """The folder of the bundled model; written at the first call, in a few seconds.

    The folder's name carries a hash of everything the model is made by, so that another version of
    the project writes another folder. It appears complete or not at all, also when several
    processes race.

    Args:
        cache: where the folder is kept; None: `scission` under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    cache = cache or _user_cache()
    directory = cache / f"{BUNDLED_NAME}-{_version()}"
    if directory.is_dir():
        return directory
    logger.info("writing the bundled model to %s", directory)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{BUNDLED_NAME}-", dir=cache) as scratch:
            made = Path(scratch) / "model"
            write_bundled(made)
            try:
                made.rename(directory)
            except OSError:
                # another process was first; its folder is as good
                if not directory.is_dir():
                    raise
    except OSError as error:
        raise CheckpointError(
            f"the bundled model cannot be written to {directory}: {error}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return directory


def write_bundled(directory: Path) -> None:
    """Write the bundled model into a folder: weights, configs, tokenizer and the texts of its
    chats.
    """
    # only the first start writes the model, and only writing needs torch
    from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4

    write_random_deepseek_v4(directory, BUNDLED_CONFIG, _SEED, shards=2, adjust=_make_readable)


def _make_readable(name: str, values: "Tensor") -> "Tensor":
    """Keep the random text to printable characters.

    Channel 0 is large in every embedding and so in every final state; unprintable tokens answer it
    with a negative weight.
    """
    if name == "embed.weight":
        values[:, 0] = 8.0
    elif name == "head.weight":
        is_hidden = values.new_ones(values.shape[0]).bool()
        is_hidden[readable_ids(build_tokenizer())] = False
        values[is_hidden] *= 0.1
        values[:, 0] = is_hidden.float() * -4.0
    return values


def _version() -> str:
    digest = hashlib.blake2b(json.dumps(BUNDLED_CONFIG, sort_keys=True).encode(), digest_size=6)
    for file in _MADE_BY:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "scission"
