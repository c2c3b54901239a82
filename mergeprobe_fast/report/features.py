"""The statistics as a table, one of them in full, and a crosswalk from another tool's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import CROSSWALK, Crossing
from mergeprobe_fast.features.listing import ADAPTERS, FEATURES, Statistic

if TYPE_CHECKING:
    from rich.console import Console

    from mergeprobe_fast.zoo import Zoo


def describe_features(name: str | None = None, zoo: Zoo | None = None) -> list[dict[str, Any]]:
    """Every statistic, or those called ``name``, or a crosswalk of that name, as plain JSON values.

    With a zoo each has its ``work`` there: multiply-adds, None where it is not stated.

    Raises:
        InputError: there is nothing of that name.
    """
    if name in CROSSWALK:
        return [_crossing(c) for c in CROSSWALK[name].values()]
    if name is not None and name not in FEATURES:
        known = ", ".join([*CROSSWALK, *FEATURES])
        raise InputError(f"no feature {name!r}; there are: {known}", key="features")
    chosen = FEATURES.values() if name is None else [FEATURES[name]]
    return [_statistic(s, zoo) for s in chosen]


def _statistic(s: Statistic, zoo: Zoo | None) -> dict[str, Any]:
    found = {
        "name": s.name, "of": s.of, "group": s.group, "title": s.title, "definition": s.definition,
        "low": s.low, "high": s.high, "range": s.range, "null": s.null, "needs": s.needs,
        "cost": s.cost, "source": s.source, "default": s.default,
        "aggregates": list(s.aggregates), "twin": s.twin,
    }  # fmt: skip
    return found if zoo is None else {**found, "work": s.work(zoo)}


def _crossing(c: Crossing) -> dict[str, Any]:
    return {
        "name": c.name, "of": c.of, "offered": c.offered, "column": c.declared is not None,
        "ours": list(c.ours), "remark": c.remark,
        "definition": c.declared.definition if c.declared is not None else None,
    }  # fmt: skip


def print_features(described: Sequence[dict[str, Any]], console: Console, *, whole: bool) -> None:
    """Print a list of statistics, or of a crosswalk; with ``whole`` all that is known of each."""
    from rich.text import Text

    if "remark" in described[0]:
        table = _grid()
        for d in described:
            ours = ", ".join(d["ours"]) or ("" if d["offered"] else "not offered")
            table.add_row(Text(d["name"], style="bold"), Text(ours), Text(d["remark"], style="dim"))
        console.print(table)
        return
    if not whole:
        for of, title in (("pair", "Of pairs"), ("adapter", "Of adapters")):
            for group in dict.fromkeys(d["group"] for d in described if d["of"] == of):
                _print_group(
                    f"{title}: {group[0].lower()}{group[1:]}",
                    [d for d in described if d["of"] == of and d["group"] == group], console,
                )  # fmt: skip
        console.print("* among --features all only. Other tools' names: mergeprobe-fast features "
                      f"{' or '.join(CROSSWALK)}.", style="dim")  # fmt: skip
        console.print("mergeprobe-fast features NAME explains one.", style="dim")
        return
    for d in described:
        console.print(Text(d["name"], style="bold"),
                      Text(f"{d['title']}, of {d['of']}s", style="dim"))  # fmt: skip
        console.print(Text(d["definition"]))
        table = _grid()
        over = ", ".join(f".{how}" for how in d["aggregates"])
        for key, value in (
            ("range", d["range"]), ("unrelated updates", d["null"]), ("needs", d["needs"]),
            ("multiply-adds", d["cost"]), ("of this zoo", _work(d["work"]) if "work" in d else ""),
            ("over modules", over), ("twin", d["twin"]), ("source", d["source"]),
            ("among", '"default" and "all"' if d["default"] else '"all"'),
        ):  # fmt: skip
            if value:
                table.add_row(Text(key, style="dim"), Text(value))
        console.print(table)


def _grid() -> Any:
    """A table without lines whose first column is never cut."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    return table


def _print_group(title: str, group: Sequence[dict[str, Any]], console: Console) -> None:
    from rich.text import Text

    needs = dict.fromkeys(d["needs"] for d in group if d["needs"] != ADAPTERS)
    console.print(Text(title, style="bold"))
    for number, what in enumerate(needs, 1):
        mark = "" if len(needs) == 1 else f" [{number}]"
        console.print(Text(f"  needs {what}{mark}", style="dim"))
    places = {what: f" [{k}]" for k, what in enumerate(needs, 1)} if len(needs) > 1 else {}
    table = _grid()
    for d in group:
        mark = ("" if d["default"] else "*") + places.get(d["needs"], "")
        row = [Text(f"  {d['name']}{mark}"), Text(d["title"]), Text(d["range"], style="dim")]
        if "work" in d:
            row.append(Text(_work(d["work"]), style="dim"))
        table.add_row(*row)
    console.print(table)


def _work(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "none"
