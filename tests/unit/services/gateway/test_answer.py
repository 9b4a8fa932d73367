"""What leaves for one caller, and in how many pieces."""

import asyncio

from scission.common.types import RequestId, SamplingParams, Token
from scission.services.gateway.answer import Answer
from scission.services.gateway.engine import GenerationRequest, PromptReady, TokenBatch


def _request() -> GenerationRequest:
    return GenerationRequest(RequestId("r1"), [1, 2, 3], SamplingParams(max_tokens=8), 60.0, 0.0)


def test_a_caller_who_has_fallen_behind_gets_several_steps_at_once() -> None:
    async def run() -> None:
        answer = Answer(_request())
        answer.set_computed(cached_tokens=0)
        for index in range(4):
            answer.add([Token(0, index, 10 + index)], [])
            if index == 0:
                assert isinstance(await answer.next(), PromptReady)
                assert await answer.next() == TokenBatch((Token(0, 0, 10),))
        batch = await answer.next()
        assert isinstance(batch, TokenBatch)
        assert [token.token_id for token in batch.tokens] == [11, 12, 13]
        answer.end()
        assert await answer.next() is None

    asyncio.run(run())
