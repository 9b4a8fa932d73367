"""scission-nano without services: one model that prefills and decodes on a storage of its own.

Requests are read, rendered and parsed by the gateway's own code, so that an answer differs from the
served one only where the split differs.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scission.common.cache.storage import SCRATCH, CacheStorage
from scission.common.checkpoint import weights
from scission.common.checkpoint.headers import read_json
from scission.common.checkpoint.open import open_source
from scission.common.config import ModelOptions
from scission.common.layers.numerics import KV_BLOCK, Numerics
from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.deepseek_v4 import DeepseekV4
from scission.common.model.registry import find_architecture
from scission.common.parallel.ranks import single_rank
from scission.kernels.quant import round_trip_fp8
from scission.services.gateway.chat.format import RenderedChat
from scission.services.gateway.model_folder import read_model_folder
from scission.services.gateway.openai.conversation import read_conversation
from scission.services.gateway.openai.schemas import ConversationBody

CPU = torch.device("cpu")
BATCH = 16  # sequences that decode together
CHUNK = 2048  # tokens of a prefill step


class CacheRounded(Numerics):
    """Exact, but for the cache's keys and values: they take FP8's round trip."""

    def round_kv(self, kv: Tensor, rope_dim: int) -> Tensor:
        plain = kv[:, :-rope_dim]
        plain.copy_(round_trip_fp8(plain, KV_BLOCK))
        return kv


NUMERICS = {
    "exact": Numerics(torch.float32, rounds=False),
    "fp8-cache": CacheRounded(torch.float32, rounds=False),
    "deployed": Numerics(torch.float32, rounds=True),
}


@dataclass
class Answer:
    """What came of a request: the tokens, and the message as the API would send it."""

    prompt_ids: list[int]
    token_ids: list[int]  # the end of sequence not included
    message: dict[str, Any]


@dataclass
class _Sequence:
    rendered: RenderedChat
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    slot: int = SCRATCH
    block_ids: list[int] = field(default_factory=list)


class OneProcess:
    """Answers chat requests greedily, some at a time."""

    def __init__(self, folder: Path, numerics: Numerics, max_tokens: int = 9216) -> None:
        """`max_tokens`: of a sequence, prompt and answer."""
        raw = read_json(folder / "config.json")
        architecture = find_architecture(raw)
        config = architecture.parse(raw)
        layout = architecture.layout(config, numerics, 128)
        model = weights.load_model(
            lambda w: architecture.build(w, config, single_rank(), numerics, layout.block_size),
            open_source(folder, "auto", 0),
            CPU,
            architecture.ignored(config),
        )
        assert isinstance(model, DeepseekV4)
        self.model = model
        self._blocks_each = layout.num_blocks(max_tokens)
        num_blocks = SCRATCH + 1 + BATCH * self._blocks_each
        self.storage = CacheStorage(layout, num_blocks, SCRATCH + 1 + BATCH, CPU)
        self._folder = read_model_folder(ModelOptions(folder))
        self._ends = self._folder.model.eos_token_ids | set(self._folder.chat_format.stop_token_ids)

    def answers(self, bodies: Sequence[dict[str, Any]]) -> Iterator[Answer]:
        """Of chat completion bodies, in order; of a body's options `max_tokens` alone is heeded."""
        for first in range(0, len(bodies), BATCH):
            yield from self._answer_batch(bodies[first : first + BATCH])

    @torch.inference_mode()
    def draft_hits(self, answer: Answer) -> tuple[int, int]:
        """How many of an answer's tokens the draft layer foresaw one step earlier, and of how many.

        The first token follows the prompt; the draft for the second and later ones is made at the
        token before, from the streams of the one before that.
        """
        ids = [*answer.prompt_ids, *answer.token_ids]
        if len(answer.token_ids) < 2:
            return 0, 0
        sequence = _Sequence(RenderedChat("", "content"), ids)
        self._place(sequence, 0)
        chunk = SequenceChunk(ids[:-2], 0, sequence.block_ids, sequence.slot, "none")
        streams = self.model.run_layers(build_batch([chunk], CPU), self.storage)
        following = SequenceChunk(ids[1:-1], 0, sequence.block_ids, sequence.slot, "all")
        drafts = self.model.draft_logits(streams, build_batch([following], CPU)).argmax(-1)
        num_drafts = len(answer.token_ids) - 1
        foreseen = drafts[-num_drafts:] == torch.tensor(answer.token_ids[1:])
        return int(foreseen.sum()), num_drafts

    def _answer_batch(self, bodies: Sequence[dict[str, Any]]) -> Iterator[Answer]:
        sequences = [self._read(body) for body in bodies]
        going = list(range(len(sequences)))
        next_ids = torch.cat([self._prefill(s, i) for i, s in enumerate(sequences)]).tolist()
        while going:
            still = []
            for i, token_id in zip(going, next_ids, strict=True):
                if token_id in self._ends:
                    continue
                sequences[i].token_ids.append(token_id)
                if len(sequences[i].token_ids) < bodies[i]["max_tokens"]:
                    still.append(i)
            going = still
            if going:
                next_ids = self._step([sequences[i] for i in going]).argmax(-1).tolist()
        for sequence in sequences:
            yield Answer(sequence.prompt_ids, sequence.token_ids, self._message(sequence))

    def _read(self, body: dict[str, Any]) -> _Sequence:
        conversation = read_conversation(ConversationBody.model_validate(body))
        rendered = asyncio.run(self._folder.chat_format.render(conversation))
        ids = self._folder.tokenizer.encode(rendered.prompt, add_special_tokens=False)
        return _Sequence(rendered, ids)

    def _place(self, sequence: _Sequence, number: int) -> None:
        first = SCRATCH + 1 + number * self._blocks_each
        sequence.block_ids = list(range(first, first + self._blocks_each))
        sequence.slot = SCRATCH + 1 + number
        self.storage.reset_slot(sequence.slot)

    @torch.inference_mode()
    def _prefill(self, sequence: _Sequence, number: int) -> Tensor:
        """[1] int64: the first token."""
        self._place(sequence, number)
        ids = sequence.prompt_ids
        logits = torch.empty(0)
        for start in range(0, len(ids), CHUNK):
            chunk = SequenceChunk(
                ids[start : start + CHUNK], start, sequence.block_ids, sequence.slot
            )
            logits = self.model.forward(build_batch([chunk], CPU), self.storage)
        self.handed_over(sequence.slot)
        return logits.argmax(-1)

    def handed_over(self, slot: int) -> None:
        """A prompt's state is complete in `slot` and its blocks: where services would ship it."""

    @torch.inference_mode()
    def _step(self, sequences: Iterable[_Sequence]) -> Tensor:
        """[num_seqs, vocab_size] after the last token of each."""
        chunks = [
            SequenceChunk(
                s.token_ids[-1:],
                len(s.prompt_ids) + len(s.token_ids) - 1,
                s.block_ids,
                s.slot,
            )
            for s in sequences
        ]
        return self.model.forward(build_batch(chunks, CPU), self.storage)

    def _message(self, sequence: _Sequence) -> dict[str, Any]:
        text = self._folder.tokenizer.decode(sequence.token_ids, skip_special_tokens=True)
        parser = self._folder.chat_format.new_parser(sequence.rendered, parse_tool_calls=True)
        content = reasoning = ""
        calls: dict[int, dict[str, str]] = {}
        for delta in (parser.push(text), parser.finish()):
            content += delta.content
            reasoning += delta.reasoning
            for call in delta.tool_calls:
                function = calls.setdefault(call.index, {"name": "", "arguments": ""})
                function["name"] += call.name or ""
                function["arguments"] += call.arguments
        return {
            "role": "assistant",
            "content": content,
            "reasoning_content": reasoning,
            "tool_calls": [{"function": function} for function in calls.values()],
        }
