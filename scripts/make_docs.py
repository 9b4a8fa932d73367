"""Writes docs/settings.md and docs/metrics.md from the code that they describe."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scission.common.command_line import SECTIONS_SHOWN, show_default
from scission.common.metrics import (
    DecodeMetrics,
    EngineMetrics,
    GatewayMetrics,
    HttpMetrics,
    Metrics,
    PrefillMetrics,
    RequestMetrics,
    TransferMetrics,
)
from scission.common.settings.table import SETTINGS, UNSUPPORTED
from scission.common.types import Role

DOCS = Path(__file__).parents[1] / "docs"

GROUPS: dict[str, tuple[Role, Any]] = {
    "Gateway: what clients see": (Role.GATEWAY, RequestMetrics),
    "Gateway: HTTP": (Role.GATEWAY, HttpMetrics),
    "Gateway: workers and attempts": (Role.GATEWAY, GatewayMetrics),
    "Prefill and decode: the engine": (Role.PREFILL, EngineMetrics),
    "Prefill": (Role.PREFILL, PrefillMetrics),
    "Decode": (Role.DECODE, DecodeMetrics),
    "Prefill and decode: the hand-off": (Role.DECODE, TransferMetrics),
}


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Made by `make docs`. A flag wins over the environment variable (`SCISSION_` and the name",
        "in capitals), that over the YAML file of `--config` (the name), that over the default.",
        "`serve` takes them all; P, D and G mark what `prefill`, `decode` and `gateway` use.",
        "",
        *table(
            ("flag", "default", "used by", "meaning"),
            (
                (
                    f"`{setting.flag}`" + "".join(f", `{alias}`" for alias in setting.aliases),
                    show_default(setting),
                    used_by(setting.section),
                    setting.help + (f" ({setting.metavar})" if "|" in setting.metavar else ""),
                )
                for setting in SETTINGS
            ),
        ),
        "",
        "## Known, and not supported",
        "",
        *table(
            ("flag", "accepted values", "instead"),
            (
                (f"`{item.flag}`", ", ".join(item.accepted) or "none", item.why)
                for item in UNSUPPORTED
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        "Made by `make docs`. Every process serves them on `/metrics`; all carry `model_name` and",
        "`role`. `compose/prometheus/rules.yml` gives the `vllm:` spellings.",
    ]
    for title, (role, group) in GROUPS.items():
        metrics = Metrics(role, "m", "0")
        base = {family.name for family in metrics.registry.collect()}
        group(metrics)
        families = [f for f in metrics.registry.collect() if f.name not in base]
        rows = (
            (
                f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
                family.type,
                family.documentation,
            )
            for family in sorted(families, key=lambda family: family.name)
        )
        lines += ["", f"## {title}", "", *table(("name", "type", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    headings = list(headings)
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def used_by(section: str) -> str:
    letters = {Role.PREFILL: "P", Role.DECODE: "D", Role.GATEWAY: "G"}
    used = [letter for role, letter in letters.items() if section in SECTIONS_SHOWN[role]]
    return " ".join(used) or "serve"


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(settings_page(), encoding="utf-8")
    (DOCS / "metrics.md").write_text(metrics_page(), encoding="utf-8")
