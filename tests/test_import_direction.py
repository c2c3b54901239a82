"""Imports point one way: from the command line down to the kernels, and never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# From the bottom up; those of one floor may use each other.
FLOORS = (
    {"errors", "_core"},
    {"_env", "_native"},
    {"kernels", "ops"},
    {"io"},
    {"agreement", "domains", "finding", "table"},
    {"zoo"},
    {"probes", "recorded"},
    {"engine"},
    {"features", "merging", "record"},
    {"doctor", "integrations", "screening", "sets"},
    {"merge_peft"},
    {"report"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: level for level, floor in enumerate(FLOORS) for room in floor}


def sources() -> dict[Path, list[str]]:
    """Every file of the package, and its name there."""
    found = {}
    for top, lead in (
        ("mergeprobe_fast", []), ("kernels", ["mergeprobe_fast"]),
        ("bench/merge_peft", ["mergeprobe_fast"]),
    ):  # fmt: skip
        for path in sorted((REPOSITORY / top).rglob("*.py")):
            parts = path.relative_to((REPOSITORY / top).parent).with_suffix("").parts
            found[path] = [*lead, *parts]
    return found


def imported(path: Path, name: list[str]) -> set[str]:
    """The rooms that a file imports from, its own left out, in functions and for types too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        rooms |= {t[1] for t in targets if t[0] == "mergeprobe_fast" and len(t) > 1}
    return rooms - {name[1]}


def against(files: dict[Path, list[str]]) -> list[str]:
    """Imports that point up, and rooms that stand on no floor."""
    wrong = []
    for path, name in files.items():
        if name[1] == "__init__":  # the package itself hands names on
            continue
        for room in sorted(imported(path, name) & {*FLOOR_OF, *(n[1] for n in files.values())}):
            if FLOOR_OF.get(room, 99) > FLOOR_OF.get(name[1], -1):
                wrong.append(f"{'.'.join(name)} imports {room}")
    return wrong


def test_no_import_points_up():
    files = sources()
    if len(files) < 100:
        pytest.skip("needs the source tree")
    assert against(files) == []


def test_an_import_that_points_up_is_found(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from ..features import select\n    from ..zoo import Zoo\n")
    files = {**sources(), bad: ["mergeprobe_fast", "engine", "bad"]}
    assert against(files) == ["mergeprobe_fast.engine.bad imports features"]
