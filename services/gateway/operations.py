"""What operators and Prometheus ask the gateway about its workers."""

from typing import Any

import orjson
from fastapi import APIRouter, Response

from scission.services.gateway.cluster import Cluster
from scission.services.gateway.registry import Worker


def make_operations_router(cluster: Cluster) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/workers")
    async def workers() -> Response:
        """Every registered worker: where it is, how it is, what it holds."""
        described = [describe_worker(w) for w in cluster.registry.workers.values()]
        return _json({"workers": described})

    @router.get("/workers/http_sd")
    async def http_sd() -> Response:
        """The workers' metrics endpoints, as Prometheus' HTTP service discovery wants them."""
        return _json([_target(w) for w in cluster.registry.workers.values()])

    return router


def describe_worker(worker: Worker) -> dict[str, Any]:
    description, load = worker.description, worker.link.load
    return {
        "worker_id": worker.worker_id,
        "role": worker.role,
        "state": worker.state(),
        "epoch": f"{description.epoch:x}",
        "grpc_address": description.grpc_address,
        "transfer_address": description.transfer_address,
        "metrics_address": description.metrics_address,
        "version": description.version,
        "served_model_name": description.served_model_name,
        "max_model_len": description.max_model_len,
        "block_size": description.block_size,
        "num_blocks": description.num_blocks,
        "max_num_seqs": description.max_num_seqs,
        "layout_digest": worker.digest,
        "num_prefixes": len(worker.prefixes),
        "num_requests": len(worker.link.sinks),
        "load": {
            "num_running": load.num_running,
            "num_queued": load.num_queued,
            "queued_tokens": load.queued_tokens,
            "free_blocks": load.free_blocks,
            "total_blocks": load.total_blocks,
            "expected_wait_s": load.expected_wait_s,
        },
    }


def _target(worker: Worker) -> dict[str, Any]:
    # `role` and `model_name` are on the metrics themselves; labels here would rename those.
    return {
        "targets": [worker.description.metrics_address],
        "labels": {
            "__meta_scission_role": worker.role,
            "__meta_scission_worker_id": worker.worker_id,
        },
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
