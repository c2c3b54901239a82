"""The file of :mod:`.merge_features`, which is also what the next call need not compute again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mergeprobe_fast.io.atomic_file import AtomicFile

from .features import encodings

NAME = "merge-features.parquet"
VERSION = 1
_OFTEN = 120.0  # seconds between two writes


def described(path: Path) -> set[str]:
    """Keys of the merges that a file has rows of; none where there is no such file."""
    try:
        rows = pq.read_table(path, columns=["row"])["row"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return set()
    return {row.rpartition("|")[0] for row in rows}


class FeatureFile:
    """The rows that are known by now, first of all those of the file that can be used again.

    Args:
        columns: "final:error" and so on, in order.
        made_from: of every row that there is to be, a digest.
        metadata: "digest" among them: rows of a file with another one are not used.

    Attributes:
        values: row -> float32 (columns,), NaN where undefined.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], made_from: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.path, self.columns = path, list(columns)
        self._place = {name: i for i, name in enumerate(self.columns)}
        self._made_from = dict(sorted(made_from.items()))
        self._metadata = {"version": str(VERSION), **metadata}
        self.values = self._kept()
        self._written = time.monotonic()

    def _kept(self) -> dict[str, np.ndarray]:
        try:
            table = pq.read_table(self.path)
        except (OSError, pa.ArrowException):  # none, or not ours; it is replaced
            return {}
        said = table.schema.metadata or {}
        if any(said.get(key.encode()) != self._metadata[key].encode()
               for key in ("version", "digest")):  # fmt: skip
            return {}
        if table.column_names != ["row", "made_from", *self.columns]:
            return {}
        values = np.empty((table.num_rows, len(self.columns)), np.float32)
        for place, name in enumerate(self.columns):
            values[:, place] = table[name].to_numpy()
        rows = zip(table["row"].to_pylist(), table["made_from"].to_pylist(), values, strict=True)
        return {row: own for row, made, own in rows if self._made_from.get(row) == made}

    def add(
        self, rows: Mapping[str, int], found: Mapping[str, Mapping[str, np.ndarray]], at: int = 0
    ) -> None:
        """Rows of a merge, by the places of their members.

        ``found`` has columns (merges, widest) by time of training; of them, merge ``at``.
        """
        for row, member in rows.items():
            values = self.values[row] = np.full(len(self.columns), np.nan, np.float32)
            for prefix, columns in found.items():
                for name, column in columns.items():
                    values[self._place[f"{prefix}:{name}"]] = column[at, member]

    def write_now_and_then(self) -> None:
        """Write if that was long ago."""
        if time.monotonic() - self._written > _OFTEN:
            self.write()

    def write(self) -> None:
        """Write all rows that are known, sorted; the same values give the same bytes."""
        rows = [row for row in self._made_from if row in self.values]
        values = np.array([self.values[row] for row in rows], np.float32)
        values = values.reshape(len(rows), len(self.columns))
        table = pa.table({
            "row": pa.array(rows, pa.string()),
            "made_from": pa.array([self._made_from[row] for row in rows], pa.string()),
            **{name: pa.array(column, pa.float32(), mask=np.isnan(column))
               for name, column in zip(self.columns, values.T, strict=True)},
        }).replace_schema_metadata(self._metadata)  # fmt: skip
        with AtomicFile(self.path, overwrite=True) as partial:
            pq.write_table(table, partial, compression="zstd", compression_level=12,
                           **encodings(table))  # fmt: skip
        self._written = time.monotonic()
