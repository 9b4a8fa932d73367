"""From request bodies to what the engine takes: defaults, and the checks that need the model."""

from dataclasses import dataclass

from scission.common.errors import ContextLengthError, RequestError, UnsupportedError
from scission.common.types import SamplingParams
from scission.services.gateway.engine import GenerationRequest
from scission.services.gateway.openai.context import Caller, ServingContext
from scission.services.gateway.openai.generation import TextOptions
from scission.services.gateway.openai.schemas import GenerationBody

MAX_LOGIT_BIAS = 1024  # entries
DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Wishes:
    """The parts of a body that its endpoint reads in its own way."""

    max_tokens: int | None  # None: the rest of the context, or `default_max_tokens` if that is less
    default_max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # the chat format's own
    keep_ids: frozenset[int] = frozenset()  # special tokens whose text is needed all the same


def check_body(body: GenerationBody, context: ServingContext) -> None:
    """The rules that concern no single field, and those that depend on our limits.

    Raises:
        RequestError: names the field at fault.
    """
    limits = context.options
    if body.n is not None and body.n > limits.max_choices:
        raise RequestError(f"n must be at most {limits.max_choices}, got {body.n}", param="n")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if body.prompt_logprobs is not None:
        if body.stream:
            raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        _check_logprobs("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs)
    vocab_size = context.model.vocab_size
    for name in ("stop_token_ids", "allowed_token_ids"):
        check_token_ids(name, getattr(body, name) or [], vocab_size)
    if body.allowed_token_ids is not None and not body.allowed_token_ids:
        raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")


def check_logprobs(name: str, count: int | None, context: ServingContext) -> None:
    """Raises RequestError when more alternatives are asked for than are served."""
    if count is not None:
        _check_logprobs(name, count, context.options.max_logprobs)


def check_token_ids(name: str, token_ids: list[int], vocab_size: int) -> None:
    """Raises RequestError for an id outside the vocabulary."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise RequestError(
            f"{name}: token id {bad} is outside the vocabulary (0 to {vocab_size - 1})", param=name
        )


def prompt_limit(body: GenerationBody, context: ServingContext) -> int | None:
    """Most tokens that a prompt may have before it is truncated; None: any number."""
    return None if body.truncate_prompt_tokens is not None else context.model.max_model_len


def build_request(
    body: GenerationBody,
    wishes: Wishes,
    prompt_token_ids: list[int],
    n: int,
    context: ServingContext,
    caller: Caller,
) -> GenerationRequest:
    """One engine request of `n` choices.

    Raises:
        ContextLengthError: prompt and completion do not fit the model's context.
        RequestError: names the field at fault.
    """
    prompt = _truncate(prompt_token_ids, body.truncate_prompt_tokens)
    max_tokens = _max_tokens(len(prompt), wishes, context.model.max_model_len)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens ({max_tokens}), got {min_tokens}",
            param="min_tokens",
        )
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(body.temperature, 1.0),
        # 0 means the likeliest token alone; engines take a share above 0
        top_p=max(_or(body.top_p, 1.0), 1e-9),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, context.model.vocab_size),
        allowed_token_ids=tuple(sorted(set(body.allowed_token_ids or ()))),
        bad_token_ids=_bad_token_ids(body.bad_words or [], context),
        seed=body.seed if body.seed is not None else context.seeds.getrandbits(63),
        stop_token_ids=tuple(sorted({*(body.stop_token_ids or ()), *wishes.stop_token_ids})),
        ignore_eos=bool(body.ignore_eos),
        logprobs=wishes.logprobs,
        prompt_logprobs=wishes.prompt_logprobs,
    )
    _check_drawable(sampling, context)
    return GenerationRequest(
        request_id=context.request_ids.next(),
        prompt_token_ids=prompt,
        sampling=sampling,
        deadline=caller.arrival + context.options.request_timeout_s,
        arrival=caller.arrival,
        n=n,
        cache_salt=body.cache_salt or "",
        external_id=caller.external_id,
        priority=body.priority or 0,
    )


def text_options(
    body: GenerationBody, wishes: Wishes, sampling: SamplingParams, context: ServingContext
) -> TextOptions:
    """How the choices' tokens become text."""
    eos = frozenset() if sampling.ignore_eos else context.model.eos_token_ids
    is_skipping = body.skip_special_tokens is not False
    return TextOptions(
        end_ids=eos | frozenset(sampling.stop_token_ids),
        skip_ids=context.tokenizer.special_ids - wishes.keep_ids if is_skipping else frozenset(),
        stop=tuple(body.stop or ()),
        is_stop_included=bool(body.include_stop_str_in_output),
        min_tokens=sampling.min_tokens,
    )


def _check_drawable(sampling: SamplingParams, context: ServingContext) -> None:
    """Something must be left to draw, at the first token too: no end counts before min_tokens."""
    if not sampling.allowed_token_ids:
        return
    barred = set(sampling.bad_token_ids)
    if sampling.min_tokens:
        barred.update(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            barred.update(context.model.eos_token_ids)
    if barred.issuperset(sampling.allowed_token_ids):
        raise RequestError(
            "allowed_token_ids leaves nothing to draw beside bad_words, and the tokens that end a "
            "choice before min_tokens",
            param="allowed_token_ids",
        )


def _check_logprobs(name: str, count: int, most: int) -> None:
    if count > most:
        raise RequestError(f"{name} must be at most {most}, got {count}", param=name)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _truncate(prompt: list[int], limit: int | None) -> list[int]:
    """The last `limit` tokens; -1 keeps the prompt whole, because it is bounded by the context
    anyway.
    """
    if limit is None or limit < 0 or limit >= len(prompt):
        return prompt
    return prompt[len(prompt) - limit :]


def _max_tokens(prompt_len: int, wishes: Wishes, context_len: int) -> int:
    if prompt_len == 0:
        raise RequestError("the prompt is empty: it must be at least one token", param="prompt")
    room = context_len - prompt_len
    if wishes.max_tokens is not None:
        if wishes.max_tokens > room:
            raise ContextLengthError(
                f"This model's maximum context length is {context_len} tokens. However, you "
                f"requested {prompt_len + wishes.max_tokens} tokens ({prompt_len} in the prompt, "
                f"{wishes.max_tokens} in the completion). Please reduce the length of either.",
                param="max_tokens" if room >= 0 else "prompt",
            )
        return wishes.max_tokens
    if room < 1:
        raise ContextLengthError(
            f"This model's maximum context length is {context_len} tokens. However, your prompt "
            f"has {prompt_len} tokens, which leaves no room for a completion. Please shorten it.",
            param="prompt",
        )
    return room if wishes.default_max_tokens is None else min(room, wishes.default_max_tokens)


def _logit_bias(entries: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(entries) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias")
    bias = {}
    for key, value in entries.items():
        # int() would take "1_0", " 1" and other digits, too
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise RequestError(
                f"logit_bias: {key[:40]!r} is no token id (0 to {vocab_size - 1})",
                param="logit_bias",
            )
        if not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias: values must be from -100 to 100, got {value}", param="logit_bias"
            )
        bias[int(key)] = float(value)
    return bias


def _bad_token_ids(words: list[str], context: ServingContext) -> tuple[int, ...]:
    """The tokens of words that are one token, alone and after a space."""
    bad: set[int] = set()
    for word in words:
        forms = [
            context.tokenizer.encode(form, add_special_tokens=False)
            for form in (word, f" {word.lstrip()}")
        ]
        single = {form[0] for form in forms if len(form) == 1}
        if not single:
            raise UnsupportedError(
                f"bad_words: {word[:40]!r} is several tokens; only single tokens are supported",
                param="bad_words",
            )
        bad |= single
    return tuple(sorted(bad))
