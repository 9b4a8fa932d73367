"""From arrived state to running sequences: the manifest is checked against the request, the choices
are forked from the one state that was shipped.
"""

from collections.abc import Collection

from scission.common.cache.block_pool import BlockPool, SlotPool, State
from scission.common.cache.storage import CacheStorage
from scission.common.errors import WireError
from scission.common.sampling import SequenceSampling, finish_reason
from scission.protos import transfer_pb2
from scission.services.decode.request import Request, Room, RunningSequence


def output_tokens(
    request: Request, manifest: transfer_pb2.Manifest, vocab_size: int
) -> dict[int, list[int]]:
    """Each choice's output so far: its forced tokens, then what the prefill sampled after them.

    Choices that the manifest leaves out have ended at the prefill.

    Raises:
        WireError: the manifest does not fit the request.
    """
    if manifest.num_tokens != request.num_tokens:
        raise WireError(
            f"state of {manifest.num_tokens} tokens came, {request.num_tokens} were reserved for"
        )
    outputs: dict[int, list[int]] = {}
    for sequence in manifest.sequences:
        if sequence.choice >= request.num_choices or sequence.choice in outputs:
            raise WireError(f"the manifest names choice {sequence.choice} twice or out of range")
        output = list(request.forced[sequence.choice])
        for token in sequence.tokens:
            if token.index < len(output):  # delivered already, by an earlier attempt
                continue
            if token.index > len(output) or token.token_id >= vocab_size:
                raise WireError(
                    f"choice {sequence.choice} has token {token.token_id} at output {token.index}"
                    f" after {len(output)} tokens"
                )
            output.append(token.token_id)
        if len(request.prompt_token_ids) + len(output) <= manifest.num_tokens:
            raise WireError(f"choice {sequence.choice} has no token left to compute")
        outputs[sequence.choice] = output
    if manifest.num_tokens > len(request.prompt_token_ids) and len(request.forced) > 1:
        raise WireError("the state of several choices covers more than their prompt")
    return outputs


def start_sequences(
    request: Request,
    outputs: dict[int, list[int]],
    eos_token_ids: Collection[int],
    max_model_len: int,
) -> dict[int, tuple[SequenceSampling, list[int]]]:
    """Per live choice that has not ended: its sampling state and the tokens still to feed."""
    started: dict[int, tuple[SequenceSampling, list[int]]] = {}
    num_prompt = len(request.prompt_token_ids)
    for choice, output in outputs.items():
        if choice not in request.live_choices:
            continue
        sampling = SequenceSampling(request.params, choice, request.prompt_token_ids, eos_token_ids)
        for token_id in output:
            sampling.append(token_id)
        if output and finish_reason(
            sampling, output[-1], eos_token_ids, num_prompt + len(output), max_model_len
        ):
            continue
        # The state covers the prompt and, in a later attempt of one choice, forced tokens.
        from_prompt = request.prompt_token_ids[request.num_tokens :]
        from_output = output[max(0, request.num_tokens - num_prompt) :]
        started[choice] = sampling, from_prompt + from_output
    return started


def fork(
    request: Request,
    room: Room,
    started: dict[int, tuple[SequenceSampling, list[int]]],
    storage: CacheStorage,
    blocks: BlockPool,
    slots: SlotPool,
) -> list[RunningSequence]:
    """Make the running sequences; the room becomes theirs, and what no sequence needs is freed."""
    first_blocks, first_slot = room.block_ids[0], room.slots[0]
    shared = first_blocks[: room.num_shared]
    has_partial = request.num_tokens % storage.layout.block_size != 0
    sequences = []
    for position in reversed(range(len(room.choices))):
        choice, own, slot = room.choices[position], room.block_ids[position], room.slots[position]
        # The first one goes last: its state is what the others copy.
        if choice not in started:
            blocks.release(own, State.RESERVED)
            slots.release([slot], State.RESERVED)
            continue
        block_ids = own
        if position > 0:
            blocks.share(shared, State.ACTIVE)
            if has_partial:
                storage.copy_block(first_blocks[room.num_shared], own[0])
            storage.copy_slot(first_slot, slot)
            block_ids = shared + own
        blocks.move(own, State.RESERVED, State.ACTIVE)
        slots.move([slot], State.RESERVED, State.ACTIVE)
        sampling, pending = started[choice]
        sequences.append(
            RunningSequence(request, sampling, block_ids, slot, request.num_tokens, pending)
        )
    return sequences[::-1]
