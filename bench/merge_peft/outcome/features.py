"""What screens and probes say of the pairs that a run has merged, beside its labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import PAIR_FEATURES
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.probes import Probes, find_probes
from mergeprobe_fast.record.probe_plan import FRACTIONS
from mergeprobe_fast.recorded import Recorded, open_recorded
from mergeprobe_fast.screening import screen
from mergeprobe_fast.zoo import Zoo

from ..tiers.plan import Tier

NAME = "features.parquet"
KEYS = ("victim", "partner", "victim_domain", "partner_domain")
FINAL = "final"
_TEXT = ("name", "path")  # of an adapter, but no number
_MORE = ("rank1_fisher",)  # statistics that are not by default, and are of use here


def phase(fraction: float) -> str:
    """The prefix of what a snapshot says: "at5%"."""
    return f"at{100 * fraction:g}%"


@dataclass(frozen=True, eq=False)
class _Phase:
    """Everything a screen says at one time of training: name -> (N, N), the victim first."""

    prefix: str
    names: tuple[str, ...]
    values: Mapping[str, np.ndarray]


def write_features(run_dir: Path, tier: Tier) -> Path:
    """Write ``features.parquet``: a row per ordered pair of adapters that occur in one merge.

    Columns: victim, partner and their domains, then float32 values, null where undefined (a module
    that one of the two lacks, a zero update, a snapshot that is missing or too early): of the
    trained weights ("final:cosine"), and of each snapshot of its training
    ("at5%:row_overlap"): the features of :func:`mergeprobe_fast.pair_features` by default, and
    rank-1 Fishers, and, of both adapters, of :func:`mergeprobe_fast.adapter_features`. In the
    names, a is the victim and b the partner. What was measured at trained weights
    (``damage_trained``) is not among the early ones.

    The calibration is the largest of the run, the domain of an adapter is its exam, and a run
    without calibration or probes has no such columns. The file's metadata count the adapters of
    each snapshot that are left out: "missing", and "too_early" (fewer than 5 steps).

    Raises:
        InputError: labels of adapters that the tier does not have; as ``pair_features`` does.
    """
    run_dir = Path(run_dir)
    pairs = _pairs(run_dir / "labels.parquet", tier)
    names = sorted({name for pair in pairs for name in pair})
    phases, omitted = [], {}
    if names:
        phases, omitted = _phases(run_dir, tier, names)
    columns = {key: pa.array(column, pa.string()) for key, column in _keys(pairs, tier)}
    for found in phases:
        columns |= _looked_up(found, pairs)
    table = pa.table(columns).replace_schema_metadata({"left_out": json.dumps(omitted)})
    path = run_dir / NAME
    with AtomicFile(path, overwrite=True) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=12,
                       **encodings(table))  # fmt: skip
    return path


def _phases(
    run_dir: Path, tier: Tier, names: Sequence[str]
) -> tuple[list[_Phase], dict[str, dict[str, int]]]:
    """What is said at each time of training, and how many snapshots are left out."""
    calibration = largest_calibration(run_dir / "calibration")
    domains = {name: tier.adapters[name].exam for name in names}
    zoo = Zoo([open_adapter(run_dir / "adapters" / name, name=name) for name in names])
    trained = open_recorded(zoo, calibration, domains if calibration else None)
    phases = [_screened(FINAL, zoo, trained)]
    omitted: dict[str, dict[str, int]] = {}
    if (run_dir / "probes").is_dir():
        probes = find_probes(run_dir / "probes")
        for fraction in FRACTIONS:
            chosen, omitted[phase(fraction)] = snapshots_at(probes, names, fraction)
            if chosen:
                # The points of a calibration are of trained weights, which nobody knows so early.
                early = Recorded(
                    trained.calibration, tuple(domains[n] for n in chosen) if calibration else (),
                    points=None, probes=tuple(chosen.values()),
                )  # fmt: skip
                at = Zoo([s.adapter for s in chosen.values()])
                phases.append(_screened(phase(fraction), at, early))
    return phases, omitted


def encodings(table: pa.Table) -> dict[str, Any]:
    """What makes floats small: a dictionary of an adapter's few, else bytes of a kind together."""
    few = [n for n in table.column_names
           if table[n].type == pa.string()
           or pc.count_distinct(table[n]).as_py() < table.num_rows / 4]  # fmt: skip
    rest = {n: "BYTE_STREAM_SPLIT" for n in table.column_names if n not in set(few)}
    return {"use_dictionary": few, "column_encoding": rest or None}


def left_out(path: Path) -> dict[str, dict[str, int]]:
    """Of the file: how many adapters have no snapshot to speak of, by time and reason."""
    return json.loads((pq.read_schema(path).metadata or {}).get(b"left_out", b"{}"))


def _pairs(labels: Path, tier: Tier) -> list[tuple[str, str]]:
    """Ordered pairs of the merges that were labelled, sorted."""
    if not labels.is_file():
        raise InputError("is not there: features stand beside labels", path=labels)
    table = pq.read_table(labels, columns=["members", "study"]).to_pydict()
    merged = {
        tuple(members)
        for members, study in zip(table["members"], table["study"], strict=True)
        if study != "routing"  # adapters side by side, nothing was merged
    }
    unknown = sorted({name for members in merged for name in members} - {*tier.adapters})
    if unknown:
        raise InputError(f"tier {tier.name} has no such adapter", path=labels, key=unknown[0])
    return sorted({pair for members in merged for pair in permutations(members, 2)})


def largest_calibration(folder: Path) -> Path | None:
    """The calibration of the most sequences, if there is any."""
    sizes = [int(p.name) for p in folder.glob("*") if p.name.isdecimal()]
    return folder / str(max(sizes)) if sizes else None


def snapshots_at(probes: Probes, names: Sequence[str], fraction: float):
    """The snapshot of each adapter that has one of enough steps, and how many do not, by reason."""
    chosen, omitted = {}, {"missing": 0, "too_early": 0}
    for name in names:
        known = probes[name] if name in probes else ()
        if not any(np.isclose(f, fraction, rtol=1e-9) for s in known for f in s.info.fractions):
            omitted["missing"] += 1
            continue
        (snapshot,) = probes.match([name], fraction, allow_early=True)
        if snapshot.too_early:
            omitted["too_early"] += 1
        else:
            chosen[name] = snapshot
    return chosen, omitted


def _screened(prefix: str, zoo: Zoo, recorded: Recorded) -> _Phase:
    more = (name for name in PAIR_FEATURES if name.startswith(_MORE))
    chosen = ["default", *(n for n in more if PAIR_FEATURES[n].missing(recorded) is None)]
    found = screen(zoo, chosen, recorded=recorded)
    values = {n: found.pairs.matrix(n) for n in found.pairs if n not in ("a", "b")}
    count = len(zoo)
    for name, column in found.adapters.items():
        if name in _TEXT:
            continue
        if name == "rank":  # "8", or the smallest and the largest: "4-8"
            column = [float(text.rpartition("-")[2]) for text in column]
        own = np.broadcast_to(np.asarray(column, np.float64)[:, None], (count, count))
        base, dot, aggregate = name.partition(".")
        sides = {f"{base}_a{dot}{aggregate}": own, f"{base}_b{dot}{aggregate}": own.T}
        assert not sides.keys() & values.keys(), name
        values |= sides
    return _Phase(prefix, tuple(zoo.names), values)


def _keys(pairs: Sequence[tuple[str, str]], tier: Tier) -> Iterator[tuple[str, list[str]]]:
    for side, own in enumerate(KEYS[:2]):
        names = [pair[side] for pair in pairs]
        yield own, names
        yield f"{own}_domain", [tier.exams[tier.adapters[n].exam].domain for n in names]


def _looked_up(found: _Phase, pairs: Sequence[tuple[str, str]]) -> dict[str, pa.Array]:
    place = {name: i for i, name in enumerate(found.names)}
    rows = [(place.get(v, -1), place.get(p, -1)) for v, p in pairs]
    victim, partner = np.array(rows, np.int64).reshape(-1, 2).T
    there = (victim >= 0) & (partner >= 0)
    columns = {}
    for name, matrix in found.values.items():
        values = np.where(there, matrix[victim, partner], np.nan)
        columns[f"{found.prefix}:{name}"] = pa.array(
            values.astype(np.float32), pa.float32(), mask=np.isnan(values)
        )
    return columns
