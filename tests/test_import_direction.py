"""Imports point one way: from the command line down to the kernels, and never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# From the bottom up; those of one floor may use each other.
FLOORS = (
    {"errors", "_core", "_cuda"},
    {"_env", "_native"},
    {"kernels", "ops"},
    {"io"},
    {"agreement", "domains", "finding", "table"},
    {"zoo"},
    {"probes", "recorded"},
    {"engine"},
    {"features", "merging", "record"},
    {"doctor", "integrations", "screening", "sets"},
    {"merge_tables", "merges"},
    {"predict"},
    {"planning"},
    {"merge_peft"},
    {"report"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# The rooms of merge_peft likewise, each on a floor of its own: none uses one that is above it.
BENCHMARK = (
    "options", "tasks", "public", "tiers", "model", "stages", "outcome", "report", "runs", "study",
    "results", "equal_cost",
)  # fmt: skip
FLOOR_OF = {room: level for level, floor in enumerate(FLOORS) for room in floor}
BENCHMARK_FLOOR_OF = {room: level for level, room in enumerate(BENCHMARK)}


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


def sources_of_the_benchmark() -> dict[Path, list[str]]:
    return {path: name for path, name in sources().items() if name[1] == "merge_peft"}


def imported(path: Path, name: list[str], depth: int) -> set[str]:
    """The rooms that a file imports from, its own left out, in functions and for types too.

    Rooms are those of the package that the first ``depth`` parts of its name are.
    """
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        rooms |= {t[depth] for t in targets if t[:depth] == name[:depth] and len(t) > depth}
    return rooms - {name[depth]}


def against(
    files: dict[Path, list[str]], floor_of: dict[str, int] = FLOOR_OF, depth: int = 1
) -> list[str]:
    """Imports that point up, and rooms that stand on no floor."""
    wrong = []
    rooms = {*floor_of, *(n[depth] for n in files.values())}
    for path, name in files.items():
        if name[1] == "__init__":  # the package itself hands names on
            continue
        for room in sorted(imported(path, name, depth) & rooms):
            if floor_of.get(room, 99) > floor_of.get(name[depth], -1):
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


def test_no_import_of_the_benchmark_points_up():
    files = sources_of_the_benchmark()
    if len(files) < 60:
        pytest.skip("needs the source tree")
    assert {name[2] for name in files.values()} == {"__init__", *BENCHMARK}
    assert against(files, BENCHMARK_FLOOR_OF, depth=2) == []


@pytest.mark.parametrize(
    ("room", "line", "found"),
    [
        ("tasks", "from ..stages import evaluate", "stages"),
        ("tasks", "from mergeprobe_fast.merge_peft.public.hub import draw", "public"),
        ("outcome", "def f():\n    from ..report.report import write_report", "report"),
        ("runs", "import mergeprobe_fast.merge_peft.study.pairs", "study"),
        ("new", "from ..tasks import build", "tasks"),
    ],
)
def test_an_import_of_the_benchmark_that_points_up_is_found(tmp_path, room, line, found):
    bad = tmp_path / "bad.py"
    bad.write_text(line + "\n")
    files = {**sources_of_the_benchmark(), bad: ["mergeprobe_fast", "merge_peft", room, "bad"]}
    name = f"mergeprobe_fast.merge_peft.{room}.bad"
    assert against(files, BENCHMARK_FLOOR_OF, depth=2) == [f"{name} imports {found}"]
