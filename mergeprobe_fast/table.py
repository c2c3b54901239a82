"""Tables of results: named columns, cheap to make, easy to take elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError


class Table(Mapping[str, Any]):
    """Columns of equal length by name; ``table["cosine"]`` is an array."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._columns[name]
        except KeyError:
            known = ", ".join(self._columns)
            raise KeyError(f"no column {name!r}; there are: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.rows} rows x {len(self)} columns>"

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self._columns.values()), ()))

    def to_pandas(self):
        """The same as a pandas DataFrame (needs pandas)."""
        try:
            import pandas
        except ImportError:
            raise InputError("needs pandas: pip install pandas", key="to_pandas") from None

        return pandas.DataFrame(self._columns)

    def to_arrow(self):
        """The same as a pyarrow Table."""
        import pyarrow

        def column(values: Any) -> Any:
            # An empty or all-None column of names would otherwise have no type.
            names = np.asarray(values).dtype.kind == "O"
            return pyarrow.array(values, pyarrow.string() if names else None)

        return pyarrow.table({name: column(values) for name, values in self._columns.items()})

    def write_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table as one parquet file."""
        import pyarrow.parquet

        pyarrow.parquet.write_table(self.to_arrow(), os.fspath(path), compression="zstd")


class PairTable(Table):
    """One row per pair of adapters: ``a``, ``b`` (names), then features.

    Attributes:
        names: the adapters, in the zoo's order.
        a, b: index of each row's adapters; a < b.
        clipped: feature values that rounding had put outside their range.
    """

    def __init__(
        self, names: Sequence[str], a: np.ndarray, b: np.ndarray, features: Mapping[str, Any],
        clipped: int = 0,
    ) -> None:  # fmt: skip
        named = np.array(names, dtype=object)
        super().__init__({"a": named[a], "b": named[b], **features})
        self.names, self.a, self.b, self.clipped = list(names), a, b, clipped

    def matrix(self, name: str) -> np.ndarray:
        """A column as an (N, N) array in the order of ``names``; NaN on the diagonal.

        Symmetric, unless the feature is directed: then ``matrix("row_capture_a_by_b")[i, j]`` is
        the share of i's energy captured by j, and its lower triangle comes from the twin column,
        which must be there (InputError).
        """
        if name in ("a", "b"):
            raise InputError("is not a feature", key=name)
        values = np.asarray(self[name])
        out = np.full((len(self.names), len(self.names)), np.nan)
        out[self.a, self.b] = values
        out[self.b, self.a] = np.asarray(self[_twin(name, self)])
        return out


def _twin(name: str, table: Mapping[str, Any]) -> str:
    """The column with a and b exchanged, or the column itself."""
    base, dot, aggregate = name.partition(".")
    for one, other in (("_a_by_b", "_b_by_a"), ("_b_by_a", "_a_by_b"), ("_a", "_b"), ("_b", "_a")):
        if base.endswith(one):
            twin = base.removesuffix(one) + other + dot + aggregate
            if twin not in table:
                raise InputError(f"is directed; its matrix needs the column {twin!r} too", key=name)
            return twin
    return name


class AdapterTable(Table):
    """One row per adapter: ``name``, what it is, and its spectrum's features."""


class SetTable(Table):
    """One row per set of adapters: ``members`` (names joined by "+"), ``size``, then features.

    Attributes:
        names: the adapters, in the zoo's order.
        members: of each set, the indices of its adapters.
    """

    def __init__(
        self, names: Sequence[str], members: np.ndarray, features: Mapping[str, Any],
        per_member: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        self.names = list(names)
        self.members = [tuple(int(i) for i in row if i >= 0) for row in members]
        joined = np.empty(len(self.members), dtype=object)
        joined[:] = ["+".join(self.names[i] for i in row) for row in self.members]
        size = np.count_nonzero(members >= 0, axis=1)
        super().__init__({"members": joined, "size": size, **features})
        self._per_member = dict(per_member)

    @property
    def member_values(self) -> tuple[str, ...]:
        """What :meth:`per_member` has."""
        return tuple(self._per_member)

    def per_member(self, name: str) -> np.ndarray:
        """A value of every member, (sets, widest) in the order of ``members``; NaN beyond a set."""
        try:
            return self._per_member[name]
        except KeyError:
            known = ", ".join(self._per_member)
            raise KeyError(f"no member value {name!r}; there are: {known}") from None


class MergeTable(Table):
    """One row per merge and member: ``merge`` (number), ``members`` (names joined by "+"),
    ``method``, ``member``, ``weight``, then features.

    Attributes:
        names: the adapters, in the zoo's order.
        sets: of each merge, the indices of its members.
        level: "weights", "calibration" or "points": how much was known.
        base_model: what the adapters are of, as they or the calibration name it; None: unknown.
        fingerprint: of that model's configuration (``config_sha256`` of the calibration); None:
            without a calibration.
    """

    def __init__(
        self, names: Sequence[str], members: np.ndarray, methods: Sequence[str],
        weights: np.ndarray, features: Mapping[str, np.ndarray], level: str,
        base_model: str | None = None, fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        self.names, self.level = list(names), level
        self.base_model, self.fingerprint = base_model, fingerprint
        self.sets = [tuple(int(i) for i in row if i >= 0) for row in members]
        there = members >= 0
        merge = np.nonzero(there)[0]
        joined = np.array(["+".join(self.names[i] for i in row) for row in self.sets], object)
        super().__init__({
            "merge": merge,
            "members": joined[merge],
            "method": np.array(methods, object)[merge],
            "member": np.array(self.names, object)[members[there]],
            "weight": weights[there],
            **{name: column[there] for name, column in features.items()},
        })  # fmt: skip
