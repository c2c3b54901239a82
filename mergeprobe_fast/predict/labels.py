"""Labelled merges: what each member kept, beside columns that were known before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.columns import RETENTION
from mergeprobe_fast.predict.feature_file import joined

TARGETS = ("ll_norm", "retention", "y")  # the first that the file has
_MERGE = ("method", "rank")  # besides members, operator and weights, what tells merges apart
_SEEDS = ("train_seed", "seed")
_RECIPE = "train_"  # columns that say how an adapter was trained begin with it
# What differs between retrainings of one adapter, and so tells no family.
_NOT_FAMILY = ("train_seed", "train_init_seed")


@dataclass(frozen=True)
class Adapter:
    """What labels say of one adapter; "" and NaN where they do not.

    Attributes:
        family: what it shares with its retrainings on other seeds.
        layers: the range it was trained on.
        recipe: numbers of its training.
    """

    name: str
    family: str = ""
    domain: str = ""
    seed: str = ""
    layers: str = ""
    recipe: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Labels:
    """Rows (merge, member). Arrays are (n,) unless said otherwise.

    Attributes:
        adapters: that the labels are about.
        members: (n, widest) numbers of a row's adapters, the row's own first, -1 behind the last.
        merge: the number of the merge: rows of one set, operator, method, rank and weights share
            it.
        operator: its name.
        y, se: what the member kept, clipped to ``RETENTION``, and its standard error as far as it
            lies in there; 0: unknown.
        columns: float64, NaN where unknown.
        weights: (n, widest) of the members in the order of ``members``; None: unknown.
        bases: names of the base models they were measured on; none: unknown.
        fingerprints: of the configurations of those bases, as calibrations have them.
        digest: SHA-256 of the file they came from; of several in ascending order, with spaces.
        methods: how to make the merge: a name of ``mergeprobe_fast.MERGE_METHODS``; None: unknown.
    """

    adapters: tuple[Adapter, ...]
    members: np.ndarray
    merge: np.ndarray
    operator: np.ndarray
    y: np.ndarray
    se: np.ndarray
    columns: Mapping[str, np.ndarray]
    weights: np.ndarray | None = None
    bases: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    digest: str = ""
    methods: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)

    def of(self, name: str) -> np.ndarray:
        """(n, widest) text attribute of each row's adapters, "" behind the last."""
        known = np.array([*(getattr(a, name) for a in self.adapters), ""], dtype=object)
        return known[self.members]

    @property
    def size(self) -> np.ndarray:
        """How many adapters were merged."""
        return np.count_nonzero(self.members >= 0, axis=1)

    @property
    def sets(self) -> np.ndarray:
        """The number of each row's set: merges of the same adapters share it."""
        return np.unique(np.sort(self.members, axis=1), axis=0, return_inverse=True)[1].ravel()

    @property
    def families(self) -> np.ndarray:
        """(n, widest) numbers of the families of each row's adapters, -1 behind the last."""
        names = np.array([a.family for a in self.adapters])
        number = np.append(np.unique(names, return_inverse=True)[1], -1)
        return number[self.members]

    @property
    def cell(self) -> np.ndarray:
        """The number of each row's own domain among the domains, directed; of larger sets: size."""
        domains, size = self.of("domain").astype(str), self.size
        own, other = domains[:, 0], domains[:, min(1, domains.shape[1] - 1)]
        return codes(own, np.where(size == 2, other, ""), size)

    def part(self, which: np.ndarray) -> Labels:
        """The rows of a mask or of numbers."""
        return replace(
            self, members=self.members[which], merge=self.merge[which],
            operator=self.operator[which], y=self.y[which], se=self.se[which],
            columns={n: v[which] for n, v in self.columns.items()},
            weights=None if self.weights is None else self.weights[which],
            methods=None if self.methods is None else self.methods[which],
        )  # fmt: skip


def codes(*columns: Sequence[Any]) -> np.ndarray:
    """One number per different row of columns."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        own = np.unique(np.asarray(column), return_inverse=True)[1].ravel()
        joined = numbers * (own.max(initial=0) + 1) + own
        numbers = np.unique(joined, return_inverse=True)[1].ravel()
    return numbers


def read_labels(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    operators: Sequence[str] = (),
    features: str | os.PathLike[str] | None = None,
    at: float | None = None,
) -> Labels:
    """The labels of a parquet or csv file.

    Its columns: ``members`` (a list, or names joined by "+"), ``member``, the target; optional:
    ``operator``, ``method``, ``rank``, ``weights`` (a list, or numbers with spaces between),
    ``<target>_se`` or ``se``, and of the row's member ``domain``, ``family``, ``train_seed`` or
    ``seed``, ``base``, ``train_...``. Every other numeric column is kept as it is. What a file says
    of an adapter it says in the rows in which that is the member: of others only the name is known.

    Args:
        target: default: the first of ``TARGETS`` that there is.
        operators: those to read; default: all.
        features: a second file with the columns of the same rows: merge-peft's
            ``merge-features.parquet``; both need a column ``row``.
        at: with it, of snapshots at this share of training, too.

    Rows without a target are left out. Without families, those that agree in domain and
    ``train_...`` columns but for seeds are one; without those, every adapter is its own.

    Raises:
        InputError: a file that cannot be read, a column that is missing or of the wrong type, a
            member that is not among the members, rows that contradict each other.
    """
    path = Path(path)
    columns = _read(path)
    if features is not None:
        columns = joined(columns, path, Path(features), at, _read)
    name = target or next((t for t in TARGETS if t in columns), TARGETS[0])
    for needed in ("members", "member", name, *(("operator",) if operators else ())):
        if needed not in columns:
            raise InputError("has no such column", path=path, key=needed)
    y = _numbers(columns[name], name, path)
    operator = np.array([o or "" for o in columns.get("operator", [""] * len(y))], dtype=object)
    keep = np.isfinite(y)
    if operators:
        keep &= np.isin(operator.astype(str), list(operators))
    at = np.flatnonzero(keep)
    if not len(at):
        of = f" of {', '.join(operators)}" if operators else ""
        raise InputError(f"no row{of} has a value", path=path, key=name)
    columns = {n: [values[i] for i in at] for n, values in columns.items()}
    error = next((n for n in (f"{name}_se", "se") if n in columns), None)
    se = np.zeros(len(at)) if error is None else _numbers(columns[error], error, path)
    adapters, members, weights = _sets(columns, path)
    operator = operator[at].astype(str)
    # One merge in whatever order its members stand.
    order = np.argsort(members, axis=1, kind="stable")
    keys = [*np.sort(members, axis=1).T, operator]
    keys += [np.array([str(v) for v in columns[n]]) for n in _MERGE if n in columns]
    if weights is not None:
        keys += [np.nan_to_num(w) for w in np.take_along_axis(weights, order, 1).T]
    merge = codes(*keys)
    return Labels(
        adapters, members, merge, operator, np.clip(y[at], *RETENTION), _inside(y[at], _errors(se)),
        {n: _numbers(v, n, path) for n, v in columns.items() if _numeric(v)}, weights,
        tuple(sorted({b for b in columns.get("base", ()) if b})), (),
        hashlib.sha256(path.read_bytes()).hexdigest(),
        np.array(columns["method"], dtype=object) if "method" in columns else None,
    )  # fmt: skip


def _read(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    if not path.is_file():
        raise InputError("is not there" if not path.exists() else "is not a file", path=path)
    try:
        if path.suffix == ".csv":
            quoted = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(path, parse_options=quoted)
        else:
            table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot be read: {reason}", path=path) from None
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError("column appears twice", path=path, key=twice)
    return table.to_pydict()


def _numeric(values: Sequence[Any]) -> bool:
    kinds = {type(v) for v in values} - {type(None)}
    return bool(kinds) and kinds <= {int, float, bool}


def _numbers(values: Sequence[Any], name: str, path: Path) -> np.ndarray:
    try:
        found = np.array([np.nan if v is None else v for v in values], np.float64)
    except (TypeError, ValueError):
        raise InputError("is not a column of numbers", path=path, key=name) from None
    found[np.isinf(found)] = np.nan
    return found


def _errors(se: np.ndarray) -> np.ndarray:
    """Unknown ones are as large as those that are known; without any, 0."""
    known = np.isfinite(se)
    usual = float(np.sqrt(np.square(se[known]).mean())) if known.any() else 0.0
    return np.where(known, np.abs(se), usual)


def _inside(y: np.ndarray, se: np.ndarray) -> np.ndarray:
    """Half of what clipping leaves of ``y - se`` to ``y + se``: far outside nothing is in doubt."""
    low, high = (np.clip(y + sign * se, *RETENTION) for sign in (-1, 1))
    return (high - low) / 2


def _sets(
    columns: Mapping[str, list[Any]], path: Path
) -> tuple[tuple[Adapter, ...], np.ndarray, np.ndarray | None]:
    """The adapters, and of each row their numbers and weights, its own first."""
    for name in ("members", "member"):
        for i, value in enumerate(columns[name]):
            if value is None or value == "" or value == []:
                raise InputError(f"row {i} names nobody", path=path, key=name)
    # A csv of names that are numbers is read as numbers.
    rows, own = [_names(v) for v in columns["members"]], [str(v) for v in columns["member"]]
    given = [_weights(v, path) for v in columns["weights"]] if "weights" in columns else None
    names = sorted({n for row in rows for n in row})
    number = {n: i for i, n in enumerate(names)}
    members = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    weights = None if given is None else np.full(members.shape, np.nan)
    for i, (row, member) in enumerate(zip(rows, own, strict=True)):
        if member not in row or len(set(row)) < len(row):
            reason = "are not different" if member in row else f"do not hold {member!r}"
            raise InputError(f"row {i}: the members {reason}", path=path, key="members")
        order = [row.index(member), *(k for k, n in enumerate(row) if n != member)]
        members[i, : len(row)] = [number[row[k]] for k in order]
        if weights is not None and given[i] is not None:
            if len(given[i]) != len(row):
                reason = f"row {i}: {len(given[i])} weights of {len(row)} members"
                raise InputError(reason, path=path, key="weights")
            weights[i, : len(row)] = [given[i][k] for k in order]
    about: dict[str, Adapter] = {}
    for i, member in enumerate(own):
        found = _adapter(columns, i, member)
        if about.setdefault(member, found) != found:
            reason = f"row {i} says otherwise of its training than a row before"
            raise InputError(reason, path=path, key=member)
    return tuple(about.get(n, Adapter(n, n)) for n in names), members, weights


def _names(value: Any) -> list[str]:
    return [str(n) for n in value] if isinstance(value, list) else str(value).split("+")


def _weights(value: Any, path: Path) -> list[float] | None:
    if value is None or value == "":
        return None
    listed = value if isinstance(value, list) else str(value).replace(",", " ").split()
    try:
        return [float(w) for w in listed]
    except (TypeError, ValueError):
        raise InputError(f"{value!r} are no numbers", path=path, key="weights") from None


def _adapter(columns: Mapping[str, list[Any]], row: int, name: str) -> Adapter:
    def text(*names: str) -> str:
        found = next((columns[n][row] for n in names if n in columns), None)
        return "" if found is None else _plain(found)

    trained = [n for n in columns if n.startswith(_RECIPE) and n not in _NOT_FAMILY]
    recipe: dict[str, float] = {}
    for column in trained:
        value = columns[column][row]
        if isinstance(value, list):  # a range: where it begins
            value = value[0] if value else None
        if type(value) in (int, float):
            recipe[column] = float(value)
        elif value is not None:
            recipe[f"{column}={value}"] = 1.0
    family = "|".join([text("exam", "domain"), *(text(n) for n in trained)]) if trained else name
    return Adapter(
        name, text("family") if "family" in columns else family, text("domain"), text(*_SEEDS),
        text("train_layers"), recipe,
    )  # fmt: skip


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)
