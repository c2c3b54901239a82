"""The coverage of adapters, examined and printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.coverage import Coverage, Problem, check
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.io.formats import is_adapter, open_adapter
from mergeprobe_fast.zoo import Zoo, find_adapters

if TYPE_CHECKING:
    from rich.console import Console

PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Checked:
    """Every adapter's coverage, and whether those that open fit one zoo."""

    adapters: list[Coverage]
    notes: list[str]
    zoo_problem: str | None

    @property
    def ok(self) -> bool:
        return self.zoo_problem is None and all(c.ok for c in self.adapters)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ok": self.ok,
            "zoo_problem": self.zoo_problem,
            "notes": self.notes,
            "adapters": [c.to_dict() for c in self.adapters],
        }


def check_paths(paths: Sequence[str], *, same_base: bool = False) -> Checked:
    """Examine adapters, and folders of them, one by one and then as a zoo.

    InputError when a folder holds no adapters.
    """
    notes: list[str] = []
    folders: list[Path] = []
    for path in map(Path, paths):
        if is_adapter(path) or not path.is_dir():
            folders.append(path)
        else:
            folders += [folder for _, folder in find_adapters(path, notes)]
    covered = [_with_values(check(folder)) for folder in folders]
    good = [open_adapter(c.path, name=str(c.path)) for c in covered if c.ok]
    problem = None
    if len(good) > 1:
        try:
            notes += (n for n in Zoo(good, same_base=same_base).notes if n not in notes)
        except InputError as error:
            problem = str(error)
    return Checked(covered, notes, problem)


def _with_values(coverage: Coverage) -> Coverage:
    """Also reads the weights of an adapter that opens: they must be finite."""
    if not coverage.ok:
        return coverage
    problems = []
    try:
        for module in open_adapter(coverage.path).modules.values():
            for factor in (module.a, module.b):
                raw = np.fromfile(
                    factor.file.path, np.uint8, factor.nbytes, offset=factor.offset
                ).view(STORAGE[factor.dtype])
                if not np.isfinite(to_f32(raw, factor.dtype)).all():
                    reason = "holds NaN or infinite values"
                    problems.append(Problem(str(factor.file.path), factor.key, reason))
    except (OSError, ValueError) as error:  # the file changed meanwhile
        problems.append(Problem(str(coverage.path), None, str(error)))
    return replace(coverage, problems=tuple(problems))


def print_coverage(result: Checked, console: Console) -> None:
    """One line an adapter, its problems below it, and the verdict."""
    from rich.text import Text

    from mergeprobe_fast.report.terminal import View

    view = View(console)
    for c in result.adapters:
        counts = c.counts()
        mark = Text("ok      ", style="green") if c.ok else Text("refused ", style="bold red")
        ranks = sorted({m.rank for m in c.modules})
        facts = f"{len(c.modules)} modules"
        if ranks:
            facts += f", rank {ranks[0]}" + (f"-{ranks[-1]}" if len(ranks) > 1 else "")
        scales = sorted({round(m.scale, 6) for m in c.modules if m.scale is not None})
        if scales:
            facts += f", scale {scales[0]:g}" + (f" to {scales[-1]:g}" if len(scales) > 1 else "")
        facts += f", {counts['used']} tensors {'used' if c.ok else 'readable'}"
        for status in ("refused", "ignored"):
            if counts[status]:
                facts += f", {counts[status]} {status}"
        console.print(mark + view.text(c.path, max(20, console.width - 9)))
        console.print(Text(f"        {facts}", style="dim"))
        for p in c.problems[:PROBLEMS_SHOWN]:
            where = f"{view.clean(p.key)}: " if p.key else ""
            console.print(
                Text(f"        {where}{view.clean(p.reason)}", style="red", overflow="fold")
            )
        if len(c.problems) > PROBLEMS_SHOWN:
            console.print(f"        and {len(c.problems) - PROBLEMS_SHOWN} more problems (--json)")
        for key in (k for k in c.keys if k.status == "ignored"):
            console.print(Text(f"        ignored {view.clean(key.key)}: {key.reason}", style="dim"))
        for note in c.notes:
            console.print(Text(f"        note: {view.clean(note)}", style="yellow"))
    for note in result.notes:
        console.print(Text(f"note: {view.clean(note)}", style="yellow", overflow="fold"))
    if result.zoo_problem:
        console.print(Text(f"not one zoo: {view.clean(result.zoo_problem)}", style="bold red"))
    bad = sum(not c.ok for c in result.adapters)
    console.print(f"{len(result.adapters)} adapters, {bad} refused", style="bold")
