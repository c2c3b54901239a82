"""Measured merges: which ones to evaluate, and the table that comes back."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning.book import Book, Set
from mergeprobe_fast.planning.judge import METHODS, WEIGHTS
from mergeprobe_fast.planning.verdict import Verdict

COLUMNS = ("members", "operator", "weights", "member", "base", "single", "merged")
RANGE = (-1.0, 1.2)  # of retention: beyond, a merge is as bad, or as good, as it gets
_POOL = 4_000  # merges that are compared
_MOST = 100_000  # rows of a file


@dataclass(frozen=True)
class Candidate:
    """A merge to evaluate: members by rank, what it is done with, and how much it would tell."""

    ranks: Set
    verdict: Verdict
    telling: float


def choose(book: Book, groups: Sequence[Set], count: int) -> list[Candidate]:
    """The ``count`` merges whose measurement tells most about where the floor lies, for this plan.

    What a measurement is worth is what it can change. A merge counts by its uncertainty, the width
    of the worst member's interval (where none is claimed, all count the same), times how near that
    member is to the floor, ``exp(-(distance / scale)^2 / 2)`` with a quarter of the retention scale
    as ``scale``: far from the floor no measurement changes a decision. The merges that the plan
    makes count double.

    Taken greedily, each next one discounted by its overlap with those taken (the largest share of
    members in common, Jaccard): measuring the same adapters again tells less about the others. A
    greedy choice under such a discount is the usual approximation to the best set, which is hard.

    Candidates are the sets that the planner had judged, up to some thousand of the nearest to the
    floor; the first of equals is taken, so that the choice is the same every time. Where the
    predictor abstains there are none: a measurement would not make it answer.
    """
    if count < 1:
        raise InputError(f"must be positive, got {count}", key="calibrate-with")
    own = [g for g in groups if len(g) > 1]
    pool: dict[Set, Candidate] = {}
    for ranks in [*own, *book.known_sets()]:
        verdict = book.best(ranks) or book.closest(ranks)
        if ranks in pool or verdict is None or not verdict.known:
            continue
        pool[ranks] = Candidate(ranks, verdict, _telling(verdict, book.floor, ranks in own))
    ranked = sorted(pool.values(), key=lambda c: (-c.telling, len(c.ranks), c.ranks))[:_POOL]
    if not ranked:
        raise InputError("no merge was predicted that could be measured", key="calibrate-with")
    value = np.array([c.telling for c in ranked])
    overlap = np.zeros(len(ranked))
    chosen: list[Candidate] = []
    for _ in range(min(count, len(ranked))):
        at = int(np.argmax(value * (1 - overlap)))
        chosen.append(ranked[at])
        mine = set(ranked[at].ranks)
        common = np.array([len(mine.intersection(c.ranks)) / len(mine.union(c.ranks))
                           for c in ranked])  # fmt: skip
        overlap = np.maximum(overlap, common)
        value[at] = -1.0
    return chosen


def _telling(verdict: Verdict, floor: float, planned: bool) -> float:
    at = int(np.argmin(verdict.retention))
    width = verdict.high[at] - verdict.low[at]
    width = float(width) if np.isfinite(width) else 1.0
    near = math.exp(-(((verdict.retention[at] - floor) / 0.25) ** 2) / 2)
    return (2.0 if planned else 1.0) * (width + 1e-3) * (near + 1e-3)


def to_csv(chosen: Sequence[Candidate], names: Sequence[str]) -> str:
    """The merges as a table to fill in, a row per member; ``names`` by rank.

    ``base``, ``single`` and ``merged`` are the utility, or log-likelihood, on the member's own
    task: of the base model, with the adapter alone, with the merged one.
    """
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(COLUMNS)
    for candidate in chosen:
        members = [names[i] for i in candidate.ranks]
        weights = candidate.verdict.weights
        shown = "" if np.isnan(weights).any() else "+".join(repr(float(w)) for w in weights)
        for member in members:
            write.writerow([_joined(members), candidate.verdict.action, shown, member, "", "", ""])
    return out.getvalue()


def _joined(members: Sequence[str]) -> str:
    plain = all("+" not in m and not m.startswith("[") and m == m.strip() for m in members)
    return "+".join(members) if plain else json.dumps(list(members), ensure_ascii=False)


@dataclass(frozen=True)
class Measured:
    """Retention of members of merges that were evaluated; members are indices of a zoo.

    ``weights``, of each merge in the order of its members, are what it was made with; None: those
    that its action takes. Empty: None for all.
    """

    members: tuple[tuple[int, ...], ...]
    actions: tuple[str, ...]
    retention: tuple[tuple[float, ...], ...]  # NaN where it was not measured
    weights: tuple[tuple[float, ...] | None, ...] = ()

    @property
    def labels(self) -> int:
        """How many members were measured."""
        return sum(math.isfinite(r) for row in self.retention for r in row)


def read_measured(path: str | os.PathLike[str], names: Sequence[str]) -> Measured:
    """The table of ``to_csv`` filled in; rows whose three numbers are all empty are left out.

    Retention is ``(merged - base) / (single - base)``, clipped to -1 to 1.2.

    Raises:
        InputError: naming the line: a column or adapter that does not exist, a number that is none,
            an adapter that is no better than the base model, nothing filled in.
    """
    rows = _rows(Path(path))
    index = {name: i for i, name in enumerate(names)}
    merges: dict[tuple[str, tuple[int, ...], tuple[float, ...] | None], dict[int, float]] = {}
    for line, row in rows:
        def refuse(reason: str, column: str, line: int = line) -> InputError:
            return InputError(reason, path=path, key=f"line {line}: {column}")

        members = [_known(name, index, refuse) for name in _split(row["members"], refuse)]
        key = tuple(sorted(members))
        if len(set(key)) != len(key) or len(key) < 2:
            raise refuse("expected at least two different adapters", "members")
        action = row["operator"].strip()
        if action not in METHODS:
            raise refuse(f"{action!r} is none of {', '.join(METHODS)}", "operator")
        weights = _weights(row["weights"].strip(), members, refuse)
        if weights is not None and action not in WEIGHTS:
            raise refuse(f"{action} takes none", "weights")
        shown = row["member"]
        member = index.get(shown, index.get(shown.strip()))
        if member not in key:
            raise refuse(f"{shown!r} is not among the members", "member")
        kept = _retention(row, refuse)
        if kept is None:
            continue
        own = merges.setdefault((action, key, weights), {})
        if member in own:
            raise refuse(f"{shown!r} was measured in this merge before", "member")
        own[member] = kept
    if not merges:
        raise InputError("no row is filled in: base, single and merged", path=path)
    return Measured(
        tuple(members for _, members, _ in merges), tuple(action for action, _, _ in merges),
        tuple(tuple(own.get(i, math.nan) for i in k[1]) for k, own in merges.items()),
        tuple(weights for _, _, weights in merges),
    )  # fmt: skip


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a BOM
            reader = csv.reader(file, strict=True)
            head = [h.strip() for h in next(reader, [])]
            for column in COLUMNS:
                if column not in head:
                    raise InputError(f"has no column {column!r}", path=path)
            if len(set(head)) != len(head):
                raise InputError("has a column twice", path=path)
            out = []
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(head):
                    raise InputError(f"has {len(row)} cells, not {len(head)}", path=path,
                                     key=f"line {reader.line_num}")  # fmt: skip
                out.append((reader.line_num, dict(zip(head, row, strict=True))))
                if len(out) > _MOST:
                    raise InputError(f"has more than {_MOST} rows", path=path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or f"is no table: {error}"
        raise InputError(reason, path=path) from None
    return out


def _split(cell: str, refuse: Callable[[str, str], InputError]) -> list[str]:
    if not cell.lstrip().startswith("["):
        return [part.strip() for part in cell.split("+")]
    try:
        found = json.loads(cell)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(f, str) for f in found):
        raise refuse("is no list of names", "members")
    return found


def _weights(
    cell: str, members: Sequence[int], refuse: Callable[[str, str], InputError]
) -> tuple[float, ...] | None:
    """In the order of the ascending members; None for an empty cell."""
    if not cell:
        return None
    try:
        found = [float(part) for part in cell.split("+")]
    except ValueError:
        found = []
    if len(found) != len(members) or not np.isfinite(found).all():
        raise refuse(f"expected {len(members)} numbers with a + between, got {cell!r}", "weights")
    return tuple(weight for _, weight in sorted(zip(members, found, strict=True)))


def _known(name: str, index: dict[str, int], refuse: Callable[[str, str], InputError]) -> int:
    if name not in index:
        raise refuse(f"no adapter {name!r} in the zoo", "members")
    return index[name]


def _retention(row: dict[str, str], refuse: Callable[[str, str], InputError]) -> float | None:
    given = [row[c].strip() for c in ("base", "single", "merged")]
    if not any(given):
        return None
    numbers = []
    for column, cell in zip(("base", "single", "merged"), given, strict=True):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise refuse(f"expected a number, got {cell!r}", column)
        numbers.append(value)
    base, single, merged = numbers
    if not single > base:
        raise refuse("is no better than the base model: nothing to retain", "single")
    return min(max((merged - base) / (single - base), RANGE[0]), RANGE[1])


def measured_file(plan: Any, count: int) -> str:
    """The table of the ``count`` merges that tell most about a plan, to be filled in."""
    if plan.book is None:
        raise InputError("was loaded from a file; make it again", key="plan")
    names = [plan.adapters[i].name for i in plan.book.order]
    rank = {name: r for r, name in enumerate(names)}
    groups = [tuple(sorted(rank[m] for m in g.members)) for g in plan.groups]
    return to_csv(choose(plan.book, groups, count), names)
