"""One step: the scheduled chunks as one pass, and what is drawn from its logits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout
from scission.common.model.batch import SequenceChunk
from scission.common.sampling import finish_reason, prompt_logprobs, sample
from scission.common.types import Finish, FinishReason, Token, TokenLogprobs
from scission.services.prefill.request import Request
from scission.services.prefill.scheduler import ScheduledChunk


def lay_out(chunk: ScheduledChunk, layout: CacheLayout) -> SequenceChunk:
    """The chunk as the model takes it: with the blocks up to its end, and the logits it needs."""
    request = chunk.request
    if request.wants_prompt_logprobs and chunk.start < request.num_prompt_tokens - 1:
        logits = "all"
    elif chunk.is_last and request.sampled_choices:
        logits = "last"
    else:
        logits = "none"
    return SequenceChunk(
        token_ids=request.token_ids[chunk.start : chunk.end],
        start=chunk.start,
        block_ids=request.held.block_ids[: layout.num_blocks(chunk.end)],
        slot=request.held.slot,
        logits=logits,
        snapshots=chunk.snapshots,
    )


def split_logits(chunks: Sequence[SequenceChunk], logits: Tensor) -> list[Tensor]:
    """Each chunk's rows [num_rows, vocab], none where it asked for none."""
    counts = {"none": 0, "last": 1}
    return list(torch.split(logits, [counts.get(c.logits, len(c.token_ids)) for c in chunks]))


def chunk_prompt_logprobs(chunk: ScheduledChunk, logits: Tensor) -> list[TokenLogprobs]:
    """Of the prompt tokens that follow the chunk's tokens: positions chunk.start + 1 and on.

    Args:
        logits: [chunk.end - chunk.start, vocab] float32.
    """
    request = chunk.request
    assert request.sampling.prompt_logprobs is not None
    end = min(chunk.end + 1, request.num_prompt_tokens)
    following = request.token_ids[chunk.start + 1 : end]
    return prompt_logprobs(logits[: len(following)], following, request.sampling.prompt_logprobs)


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """What the end of one prompt's computation brought."""

    tokens: list[Token]
    finishes: list[Finish]  # of the choices that end here


def draw_first_tokens(
    requests: Sequence[Request],
    logits: Sequence[Tensor],
    eos_token_ids: Collection[int],
    max_model_len: int,
) -> list[FirstTokens]:
    """Draw the next token of every choice that has none yet, in one batch.

    Args:
        logits: one [num_rows, vocab] float32 a request; its last row is that of the last token.
    """
    drawn = [
        (row, request.choices[choice])
        for row, request in zip(logits, requests, strict=True)
        for choice in request.sampled_choices
    ]
    rows = torch.stack([row[-1] for row, _ in drawn]) if drawn else torch.empty(0)
    samples = iter(sample(rows, [sequence for _, sequence in drawn]))
    found = []
    for request in requests:
        tokens = []
        finishes = []
        for sequence in request.choices:
            index = sequence.num_output
            finish = None
            if sequence.choice in request.sampled_choices:
                token_id, logprobs = next(samples)
                sequence.append(token_id)
                tokens.append(Token(sequence.choice, index, token_id, logprobs))
                context_len = request.num_prompt_tokens + sequence.num_output
                finish = finish_reason(
                    sequence, token_id, eos_token_ids, context_len, max_model_len
                )
            elif index >= request.sampling.max_tokens:
                finish = Finish(sequence.choice, FinishReason.LENGTH, None, index)
            if finish is not None:
                finishes.append(finish)
        found.append(FirstTokens(tokens, finishes))
    return found
