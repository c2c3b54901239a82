"""The merge methods as a table, and one of them in full."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import MERGE_METHODS
from mergeprobe_fast.merging.request import unknown_method

if TYPE_CHECKING:
    from rich.console import Console

_EQUAL = {"mean": "1/N each", "one": "1 each"}


def describe_methods(name: str | None = None) -> list[dict[str, Any]]:
    """What every method, or the one called ``name``, declares, as plain JSON values.

    Raises:
        InputError: there is no such method.
    """
    if name is not None and name not in MERGE_METHODS:
        raise InputError(unknown_method(name), key="method")
    chosen = MERGE_METHODS.values() if name is None else [MERGE_METHODS[name]]
    return [
        {
            "name": m.name,
            "summary": m.summary.replace("``", ""),
            "description": _paragraphs(inspect.getdoc(m.run) or ""),
            "least_adapters": m.arity[0],
            "most_adapters": m.arity[1],
            "needs": list(m.data),
            "takes_rank": m.takes_rank,
            "equal_weights": _EQUAL[m.weights],
            "arguments": [
                {
                    "name": key, "default": a.default, "per_adapter": a.per_adapter, "help": a.help
                }
                for key, a in m.arguments.items()
            ],
        }
        for m in chosen
    ]  # fmt: skip


def _paragraphs(text: str) -> str:
    """A docstring without its line breaks inside paragraphs, and without its mark-up."""
    parts = text.replace("``", "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def print_methods(described: Sequence[dict[str, Any]], console: Console, *, whole: bool) -> None:
    """Print names and summaries; with ``whole`` also what each is and takes."""
    from rich.table import Table
    from rich.text import Text

    if not whole:
        table = Table.grid(padding=(0, 2, 0, 0))
        for m in described:
            needs = f" (needs {', '.join(m['needs'])})" if m["needs"] else ""
            table.add_row(Text(m["name"], style="bold"), Text(m["summary"] + needs))
        console.print(table)
        console.print("mergeprobe-fast methods METHOD explains one.", style="dim")
        return
    for m in described:
        most = m["most_adapters"]
        arity = f"{m['least_adapters']}" + ("" if most == m["least_adapters"] else
                                            f" to {most}" if most else " or more")  # fmt: skip
        plural = "" if arity == "1" else "s"
        console.print(Text(m["name"], style="bold"), Text(f"{arity} adapter{plural}", style="dim"))
        console.print(Text(m["description"]))
        console.print()
        table = Table.grid(padding=(0, 2, 0, 0))
        if m["needs"]:
            table.add_row(Text("--calibration"), Text(f"with {' and '.join(m['needs'])}"))
        table.add_row(Text("--weights"), Text(f"default {m['equal_weights']}"))
        if m["takes_rank"]:
            table.add_row(Text("--rank, --energy"), Text("rank of the result"))
        for a in m["arguments"]:
            more = "; may differ by adapter and module" if a["per_adapter"] else ""
            table.add_row(
                Text(f"--set {a['name']}="), Text(f"{a['help']} (default {a['default']}{more})")
            )
        console.print(table)
