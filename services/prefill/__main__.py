"""The prefill process: `python -m scission.services.prefill` or `scission prefill`."""

import logging
import time
from functools import partial

from scission.common.cache.storage import CacheStorage
from scission.common.command_line import run_main
from scission.common.config import PrefillConfig
from scission.common.device import open_device
from scission.common.log import set_up_logging
from scission.common.model.load import load_model
from scission.common.pulse import Pulse
from scission.common.runner import NUM_SCRATCH, Runner, plan_cache
from scission.common.transfer.sender import Sender
from scission.common.types import Role
from scission.common.worker import EngineContext, run_worker
from scission.services.prefill.engine import PrefillEngine
from scission.services.prefill.meters import PrefillMeters
from scission.services.prefill.request import ModelFacts
from scission.services.prefill.state import StateStore

logger = logging.getLogger(__name__)


def run(config: PrefillConfig) -> int:
    """One prefill process, until a signal or a failure; returns its exit status."""
    set_up_logging(config.log, Role.PREFILL)
    return run_worker(Role.PREFILL, config, partial(build_engine, config))


def build_engine(config: PrefillConfig, context: EngineContext) -> PrefillEngine:
    """Load the model, allocate its state, open the transfer's end, compute once for warmth; in the
    engine's thread.
    """
    meters = PrefillMeters(context.metrics)
    started_at = time.monotonic()
    device = open_device(config.model)
    loaded = load_model(config.model, device, config.cache.block_size)
    meters.engine.start_up("load").set(time.monotonic() - started_at)

    size = plan_cache(
        loaded.layout,
        config.cache,
        num_requests=config.scheduler.max_num_seqs,
        has_prefix_cache=True,
        device=device,
    )
    storage = CacheStorage(loaded.layout, size.num_blocks, size.num_slots, device)
    runner = Runner(loaded.model, storage)
    warming_at = time.monotonic()
    # a CPU has nothing to learn from the sizes that it will see
    budget = config.scheduler.batched_tokens_on(device.type)
    num_tokens = budget if device.type == "cuda" else loaded.layout.block_size
    runner.warm_up(min(num_tokens, loaded.max_model_len))
    meters.engine.start_up("warm_up").set(time.monotonic() - warming_at)

    sender = Sender(
        storage,
        loaded.digest,
        context.worker_id,
        context.epoch,
        config.transfer,
        context.inbox.wake,
    )
    room = (size.num_blocks - NUM_SCRATCH) * loaded.layout.block_size
    facts = ModelFacts(
        vocab_size=loaded.vocab_size,
        max_model_len=min(loaded.max_model_len, room),
        eos_token_ids=loaded.eos_token_ids,
        layout_digest=loaded.digest,
    )
    logger.info(
        "model loaded",
        extra={
            "model": loaded.name,
            "device": str(device),
            "num_blocks": size.num_blocks,
            "block_bytes": loaded.layout.block_bytes,
            "num_snapshots": size.num_snapshots,
            "seconds": round(time.monotonic() - started_at, 3),
        },
    )
    if device.type == "cpu":
        Pulse(context.streams, config.discovery.beat_s).start()
    return PrefillEngine(
        runner,
        facts,
        StateStore(storage, size.num_snapshots, config.cache.enable_prefix_caching),
        sender,
        context.inbox,
        context.streams,
        config.scheduler,
        meters,
        num_layers=loaded.model.layer_groups[-1][1],
        beat_s=config.discovery.beat_s,
    )


if __name__ == "__main__":
    run_main(Role.PREFILL, run)
