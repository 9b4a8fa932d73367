"""A worker process with an engine that computes nothing: what is around an engine, tested alone.

python idle_worker.py GRPC_PORT METRICS_PORT GATEWAY [crash | busy]
"""

import sys
from pathlib import Path

from scission.common.config import (
    DiscoveryOptions,
    EndpointOptions,
    LogOptions,
    ModelOptions,
    PrefillConfig,
)
from scission.common.engine_inbox import Submit
from scission.common.log import set_up_logging
from scission.common.types import Role
from scission.common.worker import EngineContext, run_worker
from scission.protos import cluster_pb2, inference_pb2


class IdleEngine:
    def __init__(self, context: EngineContext, behaviour: str) -> None:
        self._context = context
        self._behaviour = behaviour
        self._is_stopped = False
        self._is_draining = False

    @property
    def is_idle(self) -> bool:
        return self._behaviour != "busy"

    def run(self) -> None:
        while not self._is_stopped:
            for item in self._context.inbox.drain(0.05):
                if isinstance(item, Submit):
                    if self._behaviour == "crash":
                        raise RuntimeError("as the test asked")
                    item.reply(0.0)
            self._context.streams.beat(self.load())

    def stop(self) -> None:
        self._is_stopped = True
        self._context.inbox.wake()

    def drain(self) -> None:
        self._is_draining = True

    def describe(self) -> cluster_pb2.WorkerDescription:
        return cluster_pb2.WorkerDescription(max_model_len=128, layout_digest={"model": "m"})

    def load(self) -> inference_pb2.Load:
        return inference_pb2.Load(is_draining=self._is_draining)

    def prefix_update(self, full: bool) -> cluster_pb2.PrefixUpdate:
        return cluster_pb2.PrefixUpdate()


def main() -> int:
    grpc_port, metrics_port, gateway, behaviour = (*sys.argv[1:], "")[:4]
    config = PrefillConfig(
        model=ModelOptions(Path("model")),
        discovery=DiscoveryOptions(gateways=(gateway,), heartbeat_s=0.1),
        endpoint=EndpointOptions(
            grpc_port=int(grpc_port), metrics_port=int(metrics_port), shutdown_timeout_s=0.3
        ),
    )
    set_up_logging(LogOptions(), Role.PREFILL)
    return run_worker(Role.PREFILL, config, lambda context: IdleEngine(context, behaviour))


if __name__ == "__main__":
    sys.exit(main())
