"""The decode process: `python -m scission.services.decode` or `scission decode`."""

import logging
import time
from dataclasses import replace
from functools import partial

from scission.common.cache.storage import CacheStorage
from scission.common.command_line import run_main
from scission.common.config import DecodeConfig
from scission.common.device import open_device
from scission.common.log import set_up_logging
from scission.common.model.load import load_model
from scission.common.pulse import Pulse
from scission.common.runner import NUM_SCRATCH, Runner, plan_cache
from scission.common.stepping.captured import CapturedSteps
from scission.common.stepping.progress import capture_graphs
from scission.common.stepping.seats import bucket_sizes
from scission.common.transfer.receiver import Receiver
from scission.common.types import Role
from scission.common.worker import EngineContext, run_worker
from scission.services.decode.engine import DecodeEngine
from scission.services.decode.meters import DecodeMeters
from scission.services.decode.request import ModelFacts, RunningSequence
from scission.services.decode.scheduler import CATCH_UP_TOKENS

logger = logging.getLogger(__name__)


def run(config: DecodeConfig) -> int:
    """One decode process, until a signal or a failure; returns its exit status."""
    set_up_logging(config.log, Role.DECODE)
    return run_worker(Role.DECODE, config, partial(build_engine, config))


def build_engine(config: DecodeConfig, context: EngineContext) -> DecodeEngine:
    """Load the model, allocate its state, compute once for warmth, capture the steps, open the
    transfer's end; in the engine's thread.
    """
    meters = DecodeMeters(context.metrics)
    started_at = time.monotonic()
    device = open_device(config.model)
    loaded = load_model(config.model, device, config.cache.block_size)
    meters.engine.start_up("load").set(time.monotonic() - started_at)

    size = plan_cache(
        loaded.layout,
        config.cache,
        num_requests=config.scheduler.max_num_seqs,
        has_prefix_cache=False,
        device=device,
    )
    storage = CacheStorage(loaded.layout, size.num_blocks, size.num_slots, device)
    runner = Runner(loaded.model, storage)
    warming_at = time.monotonic()
    # captured steps have one token a sequence; those that catch up have more
    runner.warm_up(1 if device.type == "cpu" else CATCH_UP_TOKENS)
    meters.engine.start_up("warm_up").set(time.monotonic() - warming_at)
    facts = ModelFacts(
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        eos_token_ids=loaded.eos_token_ids,
        layout_digest=loaded.digest,
    )
    steps: CapturedSteps[RunningSequence] | None = None
    if config.scheduler.cuda_graphs and device.type == "cuda" and loaded.model.captures:
        room = (size.num_blocks - NUM_SCRATCH) * config.cache.block_size
        max_context = min(facts.max_model_len, room)
        sizes = bucket_sizes(config.scheduler.max_num_seqs)
        steps = CapturedSteps(runner, sizes, max_context, loaded.vocab_size)
        meters.engine.start_up("capture").set(capture_graphs(steps))

    receiver = Receiver(
        storage,
        loaded.digest,
        context.worker_id,
        context.epoch,
        replace(
            config.transfer,
            advertise_host=config.transfer.advertise_host or context.advertise_host,
        ),
        context.inbox.wake,
    )
    logger.info(
        "model loaded",
        extra={
            "model": loaded.name,
            "device": str(device),
            "num_blocks": size.num_blocks,
            "block_bytes": loaded.layout.block_bytes,
            "seconds": round(time.monotonic() - started_at, 3),
        },
    )
    if device.type == "cpu":
        Pulse(context.streams, config.discovery.beat_s).start()
    return DecodeEngine(
        runner,
        facts,
        receiver,
        context.inbox,
        context.streams,
        config.scheduler,
        meters,
        beat_s=config.discovery.beat_s,
        steps=steps,
    )


if __name__ == "__main__":
    run_main(Role.DECODE, run)
