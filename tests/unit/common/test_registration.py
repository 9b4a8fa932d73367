from scission.common import rpc
from scission.common.config import DiscoveryOptions
from scission.common.registration import Registrar, WorkerState, resolve
from scission.protos import cluster_pb2, cluster_pb2_grpc, inference_pb2


class FakeGateway(cluster_pb2_grpc.RegistryServicer):
    """A registry that remembers what it was told, and forgets when asked to."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.prefixes: set[bytes] = set()
        self.calls: list[str] = []

    async def start(self, port: int = 0) -> None:
        self.server = rpc.make_server()
        cluster_pb2_grpc.add_RegistryServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.port = rpc.bind(self.server, "127.0.0.1", port)
        await self.server.start()

    async def Register(
        self, request: cluster_pb2.WorkerDescription, context: object
    ) -> cluster_pb2.RegisterReply:
        self.calls.append("register")
        self.known.add(request.worker_id)
        self.prefixes = set(request.prefixes.added)
        return cluster_pb2.RegisterReply(gateway_epoch=1)

    async def Heartbeat(
        self, request: cluster_pb2.HeartbeatRequest, context: object
    ) -> cluster_pb2.HeartbeatReply:
        self.calls.append("heartbeat")
        if request.worker_id not in self.known:
            return cluster_pb2.HeartbeatReply(is_known=False)
        self.prefixes |= set(request.prefixes.added)
        self.prefixes -= set(request.prefixes.evicted)
        return cluster_pb2.HeartbeatReply(is_known=True)

    async def Deregister(
        self, request: cluster_pb2.DeregisterRequest, context: object
    ) -> cluster_pb2.DeregisterReply:
        self.calls.append("deregister")
        self.known.discard(request.worker_id)
        return cluster_pb2.DeregisterReply()


class FakeState:
    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.changes = cluster_pb2.PrefixUpdate()

    def add(self, prefix: bytes) -> None:
        self.held.add(prefix)
        self.changes.added.append(prefix)

    def prefixes(self, full: bool) -> cluster_pb2.PrefixUpdate:
        if full:
            return cluster_pb2.PrefixUpdate(added=sorted(self.held))
        changes, self.changes = self.changes, cluster_pb2.PrefixUpdate()
        return changes

    def state(self) -> WorkerState:
        return WorkerState(
            describe=lambda: cluster_pb2.WorkerDescription(worker_id="prefill-1"),
            load=inference_pb2.Load,
            prefixes=self.prefixes,
        )


def registrar(state: FakeState, *gateways: FakeGateway) -> Registrar:
    async def resolver(host: str, port: int) -> set[str]:
        return {f"127.0.0.1:{gateway.port}" for gateway in gateways}

    options = DiscoveryOptions(gateways=("gateway:1",), heartbeat_s=5.0)
    return Registrar(state.state(), options, resolver)


async def test_a_worker_registers_at_every_address_of_the_name() -> None:
    gateways = [FakeGateway(), FakeGateway()]
    for gateway in gateways:
        await gateway.start()
    ours = registrar(FakeState(), *gateways)
    await ours.beat()
    await ours.beat()
    assert [gateway.calls for gateway in gateways] == [["register", "heartbeat"]] * 2
    await ours.deregister()
    assert not any(gateway.known for gateway in gateways)
    for gateway in gateways:
        await gateway.server.stop(0)


async def test_a_gateway_that_forgot_us_gets_the_whole_description_again() -> None:
    gateway, state = FakeGateway(), FakeState()
    await gateway.start()
    ours = registrar(state, gateway)
    state.add(b"a")
    await ours.beat()
    gateway.known.clear()
    gateway.prefixes.clear()
    state.add(b"b")
    await ours.beat()
    assert gateway.calls == ["register", "heartbeat", "register"]
    assert gateway.prefixes == state.held
    await ours.deregister()
    await gateway.server.stop(0)


async def test_a_missed_heartbeat_leaves_no_gap_in_the_prefixes() -> None:
    gateway, other, state = FakeGateway(), FakeGateway(), FakeState()
    await gateway.start()
    await other.start()
    ours = registrar(state, gateway, other)
    await ours.beat()
    await gateway.server.stop(0)
    state.add(b"missed")
    await ours.beat()
    assert other.prefixes == {b"missed"}
    await gateway.start(gateway.port)
    while b"missed" not in gateway.prefixes:
        await ours.beat()
    assert gateway.prefixes == state.held
    await ours.deregister()
    for each in (gateway, other):
        await each.server.stop(0)


async def test_an_address_resolves_to_itself_once() -> None:
    assert await resolve("127.0.0.1", 80) == {"127.0.0.1:80"}
    assert len(await resolve("localhost", 80)) == 1
