"""One choice's sampling state, and the draw of one token for each row of a batch.

Prefill draws first tokens and decode all others through the same calls, so that a token does not
depend on who drew it: what a draw needs besides the logits is the request's parameters and the
choice's tokens so far.
"""

from array import array
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from scission.common.errors import RequestError
from scission.common.types import Finish, FinishReason, SamplingParams, TokenLogprobs
from scission.kernels import sampling as kernels


class SequenceSampling:
    """What one choice's next draw depends on. `append` takes each output token, forced ones
    included, in order.
    """

    def __init__(
        self,
        params: SamplingParams,
        choice: int,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Collection[int] = (),
    ) -> None:
        """`eos_token_ids` are the model's: they are not drawn before `min_tokens` (nor is a stop
        token).
        """
        self.params = params
        self.choice = choice
        self.num_output = 0
        self.bias = {**params.logit_bias, **dict.fromkeys(params.bad_token_ids, float("-inf"))}
        self.held_back_ids = frozenset(params.stop_token_ids) | frozenset(
            () if params.ignore_eos else eos_token_ids
        )
        self.has_penalties = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        # Rows that need nothing but the most likely token; min_tokens ends on its own and is asked
        # each time.
        self._is_plain = not (
            params.temperature > 0 or self.bias or params.allowed_token_ids or self.has_penalties
        )
        # The tokens that penalties look at, and how often each was generated, side by side.
        self._seen_at: dict[int, int] = {}
        self._seen_ids = array("q")
        self._seen_counts = array("f")
        if params.repetition_penalty != 1.0:
            for token_id in prompt_token_ids:
                self._see(token_id)

    @property
    def is_plain(self) -> bool:
        """The next token is the most likely one of the logits as they are."""
        return self._is_plain and not self.is_held_back

    @property
    def is_greedy(self) -> bool:
        """The next token is the most likely one, of the adjusted logits."""
        return self.params.temperature < kernels.MIN_TEMPERATURE

    @property
    def needs_host(self) -> bool:
        """The next draw looks at what only the host has: it cannot be a captured graph's."""
        return bool(self.bias or self.params.allowed_token_ids) or self.is_held_back

    @property
    def has_device_penalties(self) -> bool:
        """Penalties are part of the captured graph's draw."""
        return self.has_penalties and not self.needs_host

    @property
    def is_held_back(self) -> bool:
        """Fewer than min_tokens are out: no end-of-sequence and no stop token is drawn."""
        return self.num_output < self.params.min_tokens

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct tokens that penalties look at, int64, and their generated counts, float32:
        copies.
        """
        return np.array(self._seen_ids, np.int64), np.array(self._seen_counts, np.float32)

    def append(self, token_id: int) -> None:
        self.num_output += 1
        if self.has_penalties:
            self._seen_counts[self._see(token_id)] += 1

    def _see(self, token_id: int) -> int:
        at = self._seen_at.setdefault(token_id, len(self._seen_ids))
        if at == len(self._seen_ids):
            self._seen_ids.append(token_id)
            self._seen_counts.append(0)
        return at


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse (RequestError) token ids that the model lacks: they would break a whole batch."""
    for name, token_ids in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_token_ids", params.bad_token_ids),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}; the vocabulary has {vocab_size} tokens",
                    param=name,
                )


def sample(
    logits: Tensor, sequences: Sequence[SequenceSampling]
) -> list[tuple[int, TokenLogprobs | None]]:
    """Draw the next token of each sequence; `append` is the caller's.

    Args:
        logits: [len(sequences), vocab] float32; unchanged.

    Returns:
        Token ids, with raw logprobs (before bias, penalties and temperature) where they are wanted.
    """
    if not sequences:
        return []
    special = [row for row, sequence in enumerate(sequences) if not sequence.is_plain]
    if len(special) == len(sequences):
        chosen = kernels.sample(logits, _draws(sequences, logits.device))
    else:
        chosen = kernels.greedy(logits)
        if special:
            rows = torch.tensor(special, device=logits.device)
            draws = _draws([sequences[row] for row in special], logits.device)
            chosen[rows] = kernels.sample(logits[rows], draws)
    wanted = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    token_ids: list[int] = chosen.tolist()
    if not wanted:
        return [(token_id, None) for token_id in token_ids]
    described = describe(
        *kernels.token_logprobs(
            logits if len(wanted) == len(sequences) else logits[wanted],
            chosen if len(wanted) == len(sequences) else chosen[wanted],
            most_alternatives([sequences[row] for row in wanted], logits.shape[1]),
        ),
        [sequences[row].params.logprobs or 0 for row in wanted],
    )
    logprobs = dict(zip(wanted, described, strict=True))
    return [(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def prompt_logprobs(
    logits: Tensor, next_token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """The logprob that each row's logits give the prompt token that follows, with `num_top`
    alternatives.

    Args:
        logits: [len(next_token_ids), vocab] float32.
        num_top: -1 is the whole vocabulary.
    """
    if not next_token_ids:
        return []
    num_top = logits.shape[1] if num_top < 0 else num_top
    following = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)
    columns = kernels.token_logprobs(logits, following, min(num_top, logits.shape[1]))
    return describe(*columns, [num_top] * len(next_token_ids))


def finish_reason(
    sequence: SequenceSampling,
    token_id: int,
    eos_token_ids: Collection[int],
    context_len: int,
    max_model_len: int,
) -> Finish | None:
    """Why the choice ends with this token, the last one appended to `sequence`; None when it goes
    on.

    Args:
        context_len: prompt and output tokens, this one included.
    """
    params = sequence.params
    if sequence.num_output >= params.min_tokens:
        if token_id in eos_token_ids and not params.ignore_eos:
            return Finish(sequence.choice, FinishReason.STOP, None, sequence.num_output)
        if token_id in params.stop_token_ids:
            return Finish(sequence.choice, FinishReason.STOP, token_id, sequence.num_output)
    if sequence.num_output >= params.max_tokens or context_len >= max_model_len:
        return Finish(sequence.choice, FinishReason.LENGTH, None, sequence.num_output)
    return None


def most_alternatives(sequences: Sequence[SequenceSampling], vocab_size: int) -> int:
    """How many alternatives must be known for each row, so that every one has its own number."""
    return min(max(sequence.params.logprobs or 0 for sequence in sequences), vocab_size)


def describe(
    logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor, num_tops: Sequence[int]
) -> list[TokenLogprobs]:
    """TokenLogprobs of each row's token, with the row's own number of alternatives.

    Args:
        logprobs, ranks, top_ids, top_logprobs: as `kernels.sampling.token_logprobs` returns them.
    """
    columns = [t.tolist() for t in (logprobs, ranks, top_ids, top_logprobs)]
    return [
        TokenLogprobs(logprob, rank, tuple(ids[:num_top]), tuple(alternatives[:num_top]))
        for logprob, rank, ids, alternatives, num_top in zip(*columns, num_tops, strict=True)
    ]


def _draws(sequences: Sequence[SequenceSampling], device: torch.device) -> kernels.Draws:
    """The sequences' parameters as tensors, one row each; what no row uses is left out."""
    params = [sequence.params for sequence in sequences]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    random = top_k = top_p = min_p = None
    if any(p.temperature > 0 for p in params):
        random = kernels.Random(
            temperatures=column([p.temperature for p in params]),
            seeds=column([p.seed for p in params], torch.int64),
            choices=column([s.choice for s in sequences], torch.int64),
            positions=column([s.num_output for s in sequences], torch.int64),
        )
        if any(p.top_k for p in params):
            top_k = column([p.top_k for p in params], torch.int64)
        if any(p.top_p < 1 for p in params):
            top_p = column([p.top_p for p in params])
        if any(p.min_p > 0 for p in params):
            min_p = column([p.min_p for p in params])
    return kernels.Draws(
        random=random,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        bias=_bias(sequences, device),
        allowed=_allowed(params, device),
        penalties=_penalties(sequences, device),
    )


def _bias(sequences: Sequence[SequenceSampling], device: torch.device) -> kernels.Bias | None:
    triples = [
        (row, token_id, value)
        for row, sequence in enumerate(sequences)
        for token_id, value in sequence.bias.items()
    ]
    triples += [
        (row, token_id, float("-inf"))
        for row, sequence in enumerate(sequences)
        if sequence.is_held_back
        for token_id in sequence.held_back_ids
    ]
    if not triples:
        return None
    rows, token_ids, values = zip(*triples, strict=True)
    return kernels.Bias(
        rows=torch.tensor(rows, device=device),
        token_ids=torch.tensor(token_ids, device=device),
        values=torch.tensor(values, dtype=torch.float32, device=device),
    )


def _allowed(params: Sequence[SamplingParams], device: torch.device) -> kernels.Allowed | None:
    pairs = [(row, t) for row, p in enumerate(params) for t in p.allowed_token_ids]
    if not pairs:
        return None
    rows, token_ids = zip(*pairs, strict=True)
    return kernels.Allowed(
        rows=torch.tensor(rows, device=device), token_ids=torch.tensor(token_ids, device=device)
    )


def _penalties(
    sequences: Sequence[SequenceSampling], device: torch.device
) -> kernels.Penalties | None:
    penalised = [(row, s.params, *s.seen) for row, s in enumerate(sequences) if s.has_penalties]
    if not any(len(token_ids) for _, _, token_ids, _ in penalised):
        return None
    lengths = torch.tensor([len(token_ids) for _, _, token_ids, _ in penalised])

    def spread(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths).to(device)

    return kernels.Penalties(
        rows=spread([row for row, *_ in penalised], torch.int64),
        token_ids=torch.from_numpy(np.concatenate([ids for _, _, ids, _ in penalised])).to(device),
        output_counts=torch.from_numpy(np.concatenate([c for *_, c in penalised])).to(device),
        presence=spread([p.presence_penalty for _, p, _, _ in penalised]),
        frequency=spread([p.frequency_penalty for _, p, _, _ in penalised]),
        repetition=spread([p.repetition_penalty for _, p, _, _ in penalised]),
    )
