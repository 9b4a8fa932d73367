import re

from scission.common.metrics import (
    BLOCK_STATES,
    DecodeMetrics,
    EngineMetrics,
    GatewayMetrics,
    HttpMetrics,
    Metrics,
    PrefillMetrics,
    RequestMetrics,
    TransferMetrics,
)
from scission.common.types import Role

GROUPS = {
    Role.GATEWAY: (HttpMetrics, RequestMetrics, GatewayMetrics),
    Role.PREFILL: (EngineMetrics, PrefillMetrics, TransferMetrics),
    Role.DECODE: (EngineMetrics, DecodeMetrics, TransferMetrics),
}


def rendered(role: Role) -> str:
    metrics = Metrics(role, "tiny", "0.1.0")
    for group in GROUPS[role]:
        group(metrics)
    return metrics.render()[0].decode()


def test_every_metric_of_every_role_keeps_promtool_quiet() -> None:
    for role in GROUPS:
        text = rendered(role)
        kinds = dict(re.findall(r"^# TYPE (scission_\S+) (\S+)$", text, re.M))
        helps = dict(re.findall(r"^# HELP (scission_\S+) (.+)$", text, re.M))
        assert len(kinds) > 10
        for name, kind in kinds.items():
            if name.endswith("_created"):
                continue
            assert ":" not in name and name == name.lower()
            assert helps[name].strip()
            assert (kind == "counter") == name.endswith("_total"), name
            assert not re.search(r"_(ms|milliseconds|kb|count|sum|bucket)$", name), name


def test_no_label_holds_anything_unbounded() -> None:
    labels = {
        label
        for role in GROUPS
        for group in re.findall(r"^scission_\w+\{(.*)\} ", rendered(role), re.M)
        for label in re.findall(r"(\w+)=", group)
    }
    assert labels <= {
        *("model_name", "role", "le", "version", "part", "state", "reason", "outcome"),
        *("finished_reason", "error_type", "method", "path", "status", "worker", "phase", "tier"),
    }


def test_block_states_sum_to_the_capacity() -> None:
    metrics = Metrics(Role.DECODE, "tiny", "0.1.0")
    engine = EngineMetrics(metrics)
    counts = {state: 2**i for i, state in enumerate(BLOCK_STATES)}
    engine.set_blocks(counts)
    text = metrics.render()[0].decode()
    values = re.findall(r"^scission_kv_blocks\{.*state=.*\} (\S+)", text, re.M)
    capacity = re.search(r"^scission_kv_blocks_capacity\{.*\} (\S+)", text, re.M)
    assert capacity is not None
    assert sum(map(float, values)) == float(capacity[1]) == 2 ** len(BLOCK_STATES) - 1
