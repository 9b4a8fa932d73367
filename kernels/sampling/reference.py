"""Drawing tokens in plain PyTorch: the definition of every number that a draw depends on.

Randomness is counter-based (Philox4x32-10): the number for a vocabulary entry depends on (seed,
choice, output position, vocabulary index) alone, so a draw is the same on every service and beside
any batch mates. Elementwise steps run in float64 where a vectorised and a scalar routine could
otherwise differ in the last bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and Random123.
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF

MIN_TEMPERATURE = 1e-5  # a lower one is greedy
# top-p's unit of probability: sums over any vocabulary stay whole numbers that float64 holds
MASS_OF_THE_LARGEST = 2.0**32
OF_PROMPT = 1 << 30


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to single logits, as triples; -inf forbids a token. Repeated pairs add up."""

    rows: Tensor  # [num_biased] int64
    token_ids: Tensor  # [num_biased] int64
    values: Tensor  # [num_biased] float32


@dataclass(frozen=True, slots=True)
class Allowed:
    """The only tokens that some rows may draw, as pairs; rows that are not named may draw any."""

    rows: Tensor  # [num_allowed] int64
    token_ids: Tensor  # [num_allowed] int64


@dataclass(frozen=True, slots=True)
class Penalties:
    """The tokens a row has seen, each (row, token) pair once, with that row's strengths."""

    rows: Tensor  # [num_seen] int64
    token_ids: Tensor  # [num_seen] int64
    output_counts: Tensor  # [num_seen] float32: times generated; 0 for a token of the prompt alone
    presence: Tensor  # [num_seen] float32
    frequency: Tensor  # [num_seen] float32
    repetition: Tensor  # [num_seen] float32


@dataclass(frozen=True, slots=True)
class Random:
    """What randomness a row draws by: one entry a row, greedy rows (temperature 0) included."""

    temperatures: Tensor  # [rows] float32; 0 is greedy
    seeds: Tensor  # [rows] int64
    choices: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64: the drawn token's index in the choice's output


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row of logits is drawn from. None: no row of the batch needs it, and nothing is
    computed for it.
    """

    random: Random | None = None  # None: every row is greedy
    top_k: Tensor | None = None  # [rows] int64; 0 is off
    top_p: Tensor | None = None  # [rows] float32; 1 is off
    min_p: Tensor | None = None  # [rows] float32; 0 is off
    bias: Bias | None = None
    allowed: Allowed | None = None
    penalties: Penalties | None = None


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The rows of a batch that runs on the device: what each is fed next, and how it draws.

    A row's position is -1 where it is padding: nothing of it is read or written.
    """

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64: of that token
    context_lens: Tensor  # [rows] int32: position + 1
    writer_ends: Tensor  # [rows] int64: position + 1
    temperatures: Tensor  # [rows] float32; 0 is greedy
    seeds: Tensor  # [rows] int64
    choices: Tensor  # [rows] int64
    counts: Tensor  # [rows] int64: tokens of the output so far, those under way included
    top_k: Tensor  # [rows] int64; 0 is off
    top_p: Tensor  # [rows] float32; 1 is off
    min_p: Tensor  # [rows] float32; 0 is off
    presence: Tensor  # [rows] float32; 0 is off
    frequency: Tensor  # [rows] float32; 0 is off
    repetition: Tensor  # [rows] float32; 1 is off
    # [rows, vocab] int32, of rows with penalties: how often each token was generated, and
    # OF_PROMPT more where the prompt has it
    seen: Tensor


def philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10.

    Args:
        counters, keys: int64 tensors of values below 2**32 that broadcast together.

    Returns:
        [..., 4] int64, each below 2**32.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(PHILOX_ROUNDS):
        # An int64 product wraps as a uint64 one does: its 64 bits are right, only its sign means
        # nothing.
        left = c0 * PHILOX_MULTIPLIERS[0]
        right = c2 * PHILOX_MULTIPLIERS[1]
        c0 = ((right >> 32) & _LOW_32) ^ (c1 ^ k0)
        c2 = ((left >> 32) & _LOW_32) ^ (c3 ^ k1)
        c1 = right & _LOW_32
        c3 = left & _LOW_32
        k0 = (k0 + PHILOX_KEY_STEPS[0]) & _LOW_32
        k1 = (k1 + PHILOX_KEY_STEPS[1]) & _LOW_32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_noise(seeds: Tensor, choices: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for each vocabulary entry.

    Entry v of a row is lane v % 4 of the counter (v // 4, position, choice, 0) under the seed's two
    halves.

    Args:
        seeds, choices, positions: [rows] int64.

    Returns:
        [rows, vocab_size] float32, finite.
    """
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device)[None]  # [1, groups]
    counters = (groups, positions[:, None], choices[:, None], torch.zeros_like(groups))
    keys = (seeds[:, None] & _LOW_32, (seeds[:, None] >> 32) & _LOW_32)
    bits = philox(counters, keys).flatten(1)[:, :vocab_size]  # [rows, vocab_size]
    # The middle of each of 2**32 cells, never 0 or 1; exact in float64. The most likely winners
    # have small uniforms here, where log1p keeps full precision.
    uniforms = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniforms)).float()


def adjust(logits: Tensor, draws: Draws) -> Tensor:
    """The logits after allowed tokens, bias and penalties, in this order: [rows, vocab] float32.

    A copy, unless there is nothing to change.
    """
    if draws.allowed is None and draws.bias is None and draws.penalties is None:
        return logits
    adjusted = logits.clone()
    if draws.allowed is not None:
        at = (draws.allowed.rows, draws.allowed.token_ids)
        adjusted[draws.allowed.rows] = float("-inf")
        adjusted[at] = logits[at]
    if draws.bias is not None:
        bias = draws.bias
        adjusted.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)
    if draws.penalties is not None:
        seen = draws.penalties
        at = (seen.rows, seen.token_ids)
        values = adjusted[at]
        values = torch.where(values > 0, values / seen.repetition, values * seen.repetition)
        values -= seen.frequency * seen.output_counts + seen.presence * (seen.output_counts > 0)
        adjusted[at] = values
    return adjusted


def keep_likely(logits: Tensor, draws: Draws) -> Tensor:
    """Forbid (-inf) what min-p, then top-k, then top-p cut off; the most likely token always stays.

    Ties are kept in the order of token ids, so that top-k keeps exactly k. Nothing depends on the
    order of a sum: min-p bounds a quotient to the largest probability, and top-p's masses are
    whole numbers.

    Args:
        logits: [rows, vocab] float32, already divided by the temperature; the largest is 0.
    """
    if draws.min_p is not None:
        logits = logits.masked_fill(logits < min_logits(draws.min_p)[:, None], float("-inf"))
    if draws.top_k is None and draws.top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    cut = torch.zeros_like(ordered, dtype=torch.bool)
    if draws.top_k is not None:
        ranks = torch.arange(logits.shape[1], device=logits.device)
        cut |= (ranks >= draws.top_k[:, None]) & (draws.top_k > 0)[:, None]
    if draws.top_p is not None:
        masses = (
            ordered.masked_fill(cut, float("-inf")).double().exp() * MASS_OF_THE_LARGEST + 0.5
        ).long()
        before = masses.cumsum(-1) - masses  # of the more likely ones
        limits = draws.top_p.double() * masses.sum(-1)
        cut |= (before >= limits[:, None]) & (draws.top_p < 1)[:, None]
        cut[:, 0] = False
    return logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), float("-inf"))


def min_logits(min_p: Tensor) -> Tensor:
    """[rows] float32: what logits below the largest, which is 0, min-p cuts off."""
    return min_p.double().log().float()


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """Draw one token a row; see the public function of the same name."""
    adjusted = adjust(logits, draws)
    if draws.random is None:
        return adjusted.argmax(-1)
    random = draws.random
    is_random = random.temperatures >= MIN_TEMPERATURE
    temperatures = torch.where(is_random, random.temperatures, 1.0)
    # Less the largest, so that a low temperature cannot overflow.
    scaled = (adjusted - adjusted.amax(-1, keepdim=True)) / temperatures[:, None]
    scaled = keep_likely(scaled, draws)
    noise = gumbel_noise(random.seeds, random.choices, random.positions, logits.shape[1])
    return torch.where(is_random[:, None], scaled + noise, adjusted).argmax(-1)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs, ranks and alternatives; see the public function of the same name."""
    logprobs = logits.log_softmax(-1)
    own_logits = logits.gather(1, token_ids[:, None])
    own = logprobs.gather(1, token_ids[:, None])[:, 0]
    ranks = (logits > own_logits).sum(-1) + 1
    top_ids = logits.topk(num_top, dim=-1).indices
    return own, ranks, top_ids, logprobs.gather(1, top_ids)


def penalise_(logits: Tensor, rows: NextTokens) -> Tensor:
    """Change the logits of tokens that rows with penalties have seen; [rows] which have any."""
    has_penalties = (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)
    is_penalised = has_penalties & (rows.positions >= 0)
    counts = (rows.seen % OF_PROMPT).float()
    repetition = rows.repetition[:, None]
    values = torch.where(logits > 0, logits / repetition, logits * repetition)
    values -= rows.frequency[:, None] * counts + rows.presence[:, None] * (counts > 0)
    logits.copy_(torch.where(is_penalised[:, None] & (rows.seen != 0), values, logits))
    return is_penalised


def draw_next_(logits: Tensor, rows: NextTokens) -> None:
    """Draw every row's next token and feed it back; see the public function of the same name."""
    is_penalised = penalise_(logits, rows)
    random = Random(rows.temperatures, rows.seeds, rows.choices, rows.counts)
    drawn = sample(logits, Draws(random, rows.top_k, rows.top_p, rows.min_p))
    is_live = rows.positions >= 0
    rows.token_ids.copy_(torch.where(is_live, drawn, rows.token_ids))
    rows.seen.scatter_add_(1, drawn[:, None], is_penalised[:, None].int())
    for tensor in (rows.positions, rows.counts):
        tensor.add_(is_live)
    for ends in (rows.context_lens, rows.writer_ends):
        ends.copy_(torch.where(is_live, rows.positions + 1, ends))
