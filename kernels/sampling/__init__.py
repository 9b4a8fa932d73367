"""Drawing tokens from logits by counter-based randomness, and the logprobs that describe them.

Each function checks its arguments (ValueError). `draw_next_` is what a captured graph holds; the
others run the plain-PyTorch reference on the tensors' device.
"""

from torch import Tensor

from scission.kernels.sampling import reference
from scission.kernels.sampling.reference import (
    MIN_TEMPERATURE,
    OF_PROMPT,
    Allowed,
    Bias,
    Draws,
    NextTokens,
    Penalties,
    Random,
)
from scission.kernels.target import target_of

__all__ = [
    "MIN_TEMPERATURE",
    "OF_PROMPT",
    "Allowed",
    "Bias",
    "Draws",
    "NextTokens",
    "Penalties",
    "Random",
    "draw_next_",
    "greedy",
    "sample",
    "token_logprobs",
]


def _check(logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or logits.element_size() != 4:
        raise ValueError(
            f"logits must be [rows, vocab] float32, got {tuple(logits.shape)} {logits.dtype}"
        )


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, of equal ones the lowest id.

    Args:
        logits: [rows, vocab] float32.

    Returns:
        [rows] int64.
    """
    _check(logits)
    return logits.argmax(-1)


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """Draw one token a row: allowed tokens, bias, penalties, temperature, min-p, top-k, top-p, then
    Gumbel-max.

    A row's token depends on its own logits and parameters alone. Temperature 0 takes the most
    likely adjusted token, of equal ones the lowest id. `logits` stay as they are.

    Args:
        logits: [rows, vocab] float32.

    Returns:
        [rows] int64.
    """
    _check(logits)
    if draws.random is not None and draws.random.temperatures.shape != (logits.shape[0],):
        raise ValueError(
            f"draws are for {len(draws.random.temperatures)} rows, logits have {logits.shape[0]}"
        )
    return reference.sample(logits, draws)


def draw_next_(logits: Tensor, rows: NextTokens, *, is_greedy: bool = False) -> None:
    """Draw each row's next token as `sample` does, and put it and its place where they are read.

    A row that is padding stays as it is. Nothing waits for the host: the launches depend on the
    shape of the logits alone.

    Args:
        logits: [rows, vocab] float32, of the tokens that `rows` holds; those of rows with penalties
            are changed.
        rows: token_ids become the drawn ones; positions, context_lens, writer_ends and counts grow
            by one, and so does what rows with penalties have seen of their token.
        is_greedy: all temperatures are 0, and no row has penalties: less is launched.
    """
    _check(logits)
    if rows.positions.shape != (logits.shape[0],):
        raise ValueError(f"there are {rows.positions.shape[0]} rows, logits have {logits.shape[0]}")
    if target_of(logits.device) is None:
        reference.draw_next_(logits, rows)
        return
    # only where a kernel is launched is Triton needed
    from scission.kernels.sampling.next_tokens import draw_next

    draw_next(logits, rows, is_greedy=is_greedy)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw logprobs of given tokens and of each row's most likely ones.

    Args:
        logits: [rows, vocab] float32, as the model gave them.
        token_ids: [rows] int64.
        num_top: alternatives a row, 0 to vocab.

    Returns:
        logprobs [rows] float32, ranks [rows] int64 (from 1: tokens strictly more likely, plus one),
        top ids [rows, num_top] int64, top logprobs [rows, num_top] float32, descending.
    """
    _check(logits)
    if not 0 <= num_top <= logits.shape[1]:
        raise ValueError(f"num_top must be 0 to {logits.shape[1]}, got {num_top}")
    return reference.token_logprobs(logits, token_ids, num_top)
