"""The doctor's findings, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_doctor(facts: Mapping[str, Any], console: Console) -> None:
    """Versions, the active instruction set, and each backend with its reason."""
    from rich.text import Text

    def line(name: str, value: str, style: str = "") -> None:
        console.print(Text(f"{name:<18}", style="dim") + Text(value, style=style, overflow="fold"))

    line("mergeprobe_fast", facts["mergeprobe_fast"])
    line("python", f"{facts['python']}, {facts['platform']}")
    line("cpu", facts["cpu"])
    if "instruction_set" in facts:
        isa = facts["instruction_set"]
        has = ", ".join(isa["available"])
        line("instruction set", f"{isa['active']} ({isa['why']}); has {has}")
        line("threads", str(facts["threads"]))
        built = ", ".join(facts["build"]["instruction_sets"])
        line("built", f"for {built} with {facts['build'].get('compiler', '?')}")
    found = (f"{k} {v or 'not installed'}" for k, v in facts["packages"].items())
    line("packages", ", ".join(found))
    for name, backend in facts["backends"].items():
        mark = "on " if backend["ok"] else "off"
        line(f"backend {name}", f"{mark} {backend['why']}", "green" if backend["ok"] else "yellow")
