"""The OpenAI-compatible routes, bound to what they stand on."""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from scission.common.errors import ScissionError
from scission.services.gateway.openai.chat import ChatJob
from scission.services.gateway.openai.completions import CompletionJob
from scission.services.gateway.openai.context import (
    CALLER_KEY,
    Caller,
    ServingContext,
    is_fit_for_log,
)
from scission.services.gateway.openai.conversation import read_conversation
from scission.services.gateway.openai.event_stream import EventStream, while_connected
from scission.services.gateway.openai.fields import check_other_fields
from scission.services.gateway.openai.json_body import JsonBodyRoute, ParsedRequest
from scission.services.gateway.openai.sampling import check_token_ids
from scission.services.gateway.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    TokenizeTextBody,
)

# The engine ends a request at its deadline; whoever has not read the end by then is cut off.
READING_GRACE_S = 30.0
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


def make_openai_router(context: ServingContext) -> APIRouter:
    router = APIRouter(route_class=JsonBodyRoute)

    @router.post("/v1/completions", responses=EVENT_STREAM, tags=["openai"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _serve(CompletionJob, body, request)

    @router.post("/v1/chat/completions", responses=EVENT_STREAM, tags=["openai"])
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _serve(ChatJob, body, request)

    async def _serve(
        job_type: type[CompletionJob] | type[ChatJob], body: Any, request: Request
    ) -> Response:
        try:
            context.metrics.ignored_fields.inc(check_other_fields(body.model_extra))
            _forget_ignored(body, request)
            caller = _caller(request, body)
            job = await job_type.prepare(body, caller, context)
            if body.stream:
                return EventStream(
                    job.stream(),
                    keep_alive_s=context.options.keep_alive_s,
                    timeout_s=context.options.request_timeout_s + READING_GRACE_S,
                    on_error=_count_error,
                    request_id=caller.external_id,
                )
            return _json(await while_connected(request.receive, job.collect()))
        except ScissionError as error:
            _count_error(error)
            raise

    def _count_error(error: Exception) -> None:
        kind = error.error_type if isinstance(error, ScissionError) else "internal_error"
        context.metrics.errors(kind).inc()

    @router.get("/v1/models", tags=["openai"])
    async def models() -> Response:
        cards = [_model_card(name) for name in context.model.names]
        return _json(orjson.dumps({"object": "list", "data": cards}))

    @router.get("/v1/models/{model_id:path}", tags=["openai"])
    async def model(model_id: str) -> Response:
        context.model.check_name(model_id)
        return _json(orjson.dumps(_model_card(model_id)))

    def _model_card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": context.model.created,
            "owned_by": "scission",
            "root": context.model.root,
            "parent": None,
            "max_model_len": context.model.max_model_len,
            "permission": [],
        }

    @router.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeBody) -> Response:
        context.model.check_name(body.model)
        if isinstance(body, TokenizeTextBody):
            text, adds_special = body.prompt, body.add_special_tokens is not False
        else:
            rendered = await context.chat_format.render(read_conversation(body))
            text = rendered.prompt
            adds_special = bool(body.add_special_tokens)
        token_ids = await context.encoder.encode(text, add_special_tokens=adds_special)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": context.model.max_model_len,
            "tokens": token_ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            answer["token_strs"] = [context.tokenizer.token_text(i) for i in token_ids]
        return _json(orjson.dumps(answer))

    @router.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeBody) -> Response:
        context.model.check_name(body.model)
        check_token_ids("tokens", body.tokens, context.model.vocab_size)
        text = context.tokenizer.decode(
            body.tokens, skip_special_tokens=bool(body.skip_special_tokens)
        )
        return _json(orjson.dumps({"prompt": text}))

    return router


def _forget_ignored(body: GenerationBody, request: Request) -> None:
    """Hold no memory, for as long as the request runs, for what nobody reads."""
    if body.model_extra is not None:
        body.model_extra.clear()
    if isinstance(request, ParsedRequest):
        request.forget_body()


def _caller(request: Request, body: GenerationBody) -> Caller:
    """Who asks: the edge's note; a fit request_id in the body counts where there is no header."""
    caller: Caller = request.scope[CALLER_KEY]
    given = body.request_id
    if given is None or "x-request-id" in request.headers or not is_fit_for_log(given):
        return caller
    return Caller(caller.arrival, given)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
