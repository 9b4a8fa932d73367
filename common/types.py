"""The words that all services share: what is asked for, what a token carries, why it ended."""

import enum
from dataclasses import dataclass, field
from typing import NewType

RequestId = NewType("RequestId", str)  # "<gateway epoch>-<counter>", unique across gateways
Attempt = NewType("Attempt", int)  # from 0; a higher one supersedes a lower one wherever it is seen
Epoch = NewType("Epoch", int)  # one life of one process, 63 random bits
WorkerId = NewType("WorkerId", str)  # "<role>-<epoch in hex>"


class Role(enum.StrEnum):
    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # cancelled


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are drawn; the gateway validates, the engines take it as it is.

    temperature 0 is greedy. top_k 0 and top_p 1 mean off. Penalties: presence and frequency count
    generated tokens only, repetition counts prompt and generated ones. `logprobs` is the number of
    alternatives per token (None: none wanted, 0: the token's own); they are raw: before
    temperature, penalties and bias.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_token_ids: tuple[int, ...] = ()  # never drawn
    seed: int = 0  # the caller's, or drawn by the gateway at admission; kept through all attempts
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence ids
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position's logprobs (natural log): the token's own and the most likely alternatives."""

    logprob: float
    rank: int  # the token's own rank in the vocabulary, from 1
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()  # descending, beside top_ids


@dataclass(frozen=True, slots=True)
class Token:
    """One output token of one choice. `index` counts its output from 0, forced tokens included."""

    choice: int
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one choice. `stop_token_id` is set when one other than end-of-sequence did it."""

    choice: int
    reason: FinishReason
    stop_token_id: int | None = None
    num_tokens: int = 0  # output tokens of the choice, the stop token included
