from typing import Any

from scission.common.types import Role
from scission.protos import cluster_pb2, inference_pb2
from scission.services.gateway.worker_link import WorkerLink


class PatientStub:
    """A worker's stub that notes how long the gateway would wait for each answer."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []

    async def Submit(self, request: Any, timeout: float) -> inference_pb2.SubmitReply:
        self.timeouts.append(timeout)
        return inference_pb2.SubmitReply()


async def test_a_submission_waits_for_the_engines_step_as_long_as_the_request_may() -> None:
    description = cluster_pb2.WorkerDescription(
        worker_id="prefill-1", role=Role.PREFILL, grpc_address="127.0.0.1:9"
    )
    link = WorkerLink(description, gateway_epoch=1, silence_s=2.0)
    stub = PatientStub()
    link._stub = stub  # type: ignore[assignment]
    try:
        for remaining_ms in (1, 500_000):
            await link.submit(inference_pb2.PrefillRequest(remaining_ms=remaining_ms))
    finally:
        await link.close()
    assert stub.timeouts == [0.001, 500.0]
