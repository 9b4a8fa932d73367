"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.sampling import likely, next_tokens


def launches() -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each; vocabularies are multiples of 16."""
    sizes = {"vocab_size": "i32:16", "part_size": "i32:16", "stride_logits_row": "i32:16"}
    constants = {"BLOCK": next_tokens.BLOCK, "MAX_PARTS": likely.MAX_PARTS}
    rows = {"logits_ptr": "*fp32", "positions_ptr": "*i64"}
    penalties = {f"{name}_ptr": "*fp32" for name in ("presence", "frequency", "repetition")}
    penalties |= {"seen_ptr": "*i32"}
    yield (
        next_tokens.penalise_kernel,
        rows | penalties | sizes | {"stride_seen_row": "i32:16"},
        {"BLOCK": next_tokens.BLOCK},
        next_tokens.NUM_WARPS,
    )
    yield (
        next_tokens.best_parts_kernel,
        rows
        | {"bests_ptr": "*fp32", "tokens_ptr": "*i32"}
        | {"bin_counts_ptr": "*i32", "bin_sums_ptr": "*i64", "bin_masses_ptr": "*i64"}
        | sizes,
        constants | {"NUM_BINS": likely.NUM_BINS},
        next_tokens.NUM_WARPS,
    )
    draws = rows | {
        "temperatures_ptr": "*fp32",
        "seeds_ptr": "*i64",
        "choices_ptr": "*i64",
        "counts_ptr": "*i64",
        "min_p_ptr": "*fp32",
        "least_keys_ptr": "*i64",
        "bests_ptr": "*fp32",
    }
    yield next_tokens.near_parts_kernel, draws | sizes, constants, next_tokens.NUM_WARPS
    yield (
        next_tokens.draw_parts_kernel,
        draws | {"tokens_ptr": "*i32"} | sizes,
        constants,
        next_tokens.NUM_WARPS,
    )
    cuts = rows | {
        "temperatures_ptr": "*fp32",
        "top_k_ptr": "*i64",
        "top_p_ptr": "*fp32",
        "min_p_ptr": "*fp32",
        "bests_ptr": "*fp32",
        "counts_ptr": "*i32",
    }
    masses = {"sums_ptr": "*i64", "masses_ptr": "*i64"}
    lists = masses | {"listed_keys_ptr": "*i64", "listed_masses_ptr": "*i64"}
    cut_constants = {"BLOCK": likely.BLOCK, "MAX_PARTS": likely.MAX_PARTS}
    yield (
        likely.count_bins_kernel,
        cuts | sizes,
        cut_constants | {"BLOCK": likely.COUNT_BLOCK},
        likely.COUNT_WARPS,
    )
    yield likely.sum_bins_kernel, cuts | masses | sizes, cut_constants, likely.NUM_WARPS
    list_constants = cut_constants | {"MAX_LISTED": likely.MAX_LISTED}
    yield likely.list_likely_kernel, cuts | lists | sizes, list_constants, likely.NUM_WARPS
    yield (
        likely.find_cut_kernel,
        cuts
        | lists
        | {"least_keys_ptr": "*i64", "vocab_size": "i32:16", "num_parts": "i32"}
        | {"stride_logits_row": "i32:16"},
        list_constants,
        likely.FIND_WARPS,
    )
    yield (
        next_tokens.feed_back_kernel,
        {"bests_ptr": "*fp32", "part_tokens_ptr": "*i32", "temperatures_ptr": "*fp32"}
        | {"tokens_ptr": "*i64", "positions_ptr": "*i64", "context_lens_ptr": "*i32"}
        | {"writer_ends_ptr": "*i64", "counts_ptr": "*i64"}
        | penalties
        | {"vocab_size": "i32:16", "num_parts": "i32", "stride_seen_row": "i32:16"},
        {"MAX_PARTS": likely.MAX_PARTS},
        next_tokens.FEED_WARPS,
    )
