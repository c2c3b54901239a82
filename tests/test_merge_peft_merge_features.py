"""Features of the merges of a run, against those of each on its own; and what is used again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calibrations import make_points
from probes import make_run

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from measured_merges import (  # noqa: E402
    ADAPTERS,
    AGAIN,
    MERGES,
    OPERATORS,
    SIZES,
    key_of,
    make_measured_run,
    make_tier,
    write_adapter,
    write_calibration,
    write_labels,
)
from tiny_tier import make_base_folder  # noqa: E402
from tiny_tier import make_tier as make_tiny_tier  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.errors import InputError  # noqa: E402
from mergeprobe_fast.features.merge_columns import level_columns  # noqa: E402
from mergeprobe_fast.io.formats import open_adapter  # noqa: E402
from mergeprobe_fast.merge_peft.outcome import merge_feature_file, merge_features  # noqa: E402
from mergeprobe_fast.merge_peft.outcome.labels import read_labels  # noqa: E402
from mergeprobe_fast.merge_peft.outcome.merge_features import write_merge_features  # noqa: E402
from mergeprobe_fast.merge_peft.runs.run import look, run  # noqa: E402
from mergeprobe_fast.merge_peft.runs.units import FEATURES  # noqa: E402
from mergeprobe_fast.merge_peft.tiers.plan import MergePlan, Tier  # noqa: E402
from mergeprobe_fast.merge_tables import merge_tables  # noqa: E402
from mergeprobe_fast.recorded import open_recorded  # noqa: E402


@pytest.fixture
def made(rng, tmp_path):
    """A run folder with two calibrations and snapshots, without points."""
    make_measured_run(tmp_path, rng)
    return tmp_path


@pytest.fixture
def pointed(made, rng):
    """The same with points, which are nobody's before the end of training."""
    opened = [open_adapter(made / "adapters" / n, name=n) for n in ADAPTERS]
    make_points(made / "calibration" / "12", opened, [e for e, _ in ADAPTERS.values()], rng)
    return made


def paths(folder):
    return [folder / "adapters" / name for name in sorted(ADAPTERS)]


def domains(names=None):
    return [ADAPTERS[name][0] for name in names or sorted(ADAPTERS)]


def read(path):
    """Row -> column -> value, and the file's metadata."""
    table = pq.read_table(path)
    assert table.column_names[:2] == ["row", "made_from"]
    assert {*table.schema.types[2:]} == {pa.float32()}
    rows = {r["row"]: r for r in table.to_pylist()}
    assert len(rows) == table.num_rows and list(rows) == sorted(rows)
    return rows, {k.decode(): v.decode() for k, v in table.schema.metadata.items()}


def differing(row, prefix, columns, at):
    """Columns of a row that are not what is in ``columns`` at a place, rounded to float32."""
    assert {n for n in row if n.startswith(f"{prefix}:")} == {f"{prefix}:{n}" for n in columns}
    wrong = set()
    for name, values in columns.items():
        value, truth = row[f"{prefix}:{name}"], float(np.float32(values[at]))
        if (value is None) != np.isnan(truth) or (
            value is not None and value != pytest.approx(truth, rel=1e-6, abs=1e-9)
        ):
            wrong.add(name)
    return wrong


class Counted:
    """Which merges are made again, and how often tables are."""

    def __init__(self, monkeypatch):
        self.merged, self.tables = [], 0
        combine, tables = merge_features.combine, merge_features.merge_tables

        def counted_combine(tier: Any, out: Any, plan: MergePlan, *rest: Any, **named: Any) -> Any:
            self.merged.append(plan.key)
            return combine(tier, out, plan, *rest, **named)

        def counted_tables(*given: Any, **named: Any) -> Any:
            self.tables += 1
            return tables(*given, **named)

        monkeypatch.setattr(merge_features, "combine", counted_combine)
        monkeypatch.setattr(merge_features, "merge_tables", counted_tables)

    def by(self, folder: Path, tier: Tier | None = None) -> list[str]:
        """Keys of what a call computed; those that are no sums were made again."""
        self.merged, told = [], []
        write_merge_features(folder, tier or make_tier(), threads=1, progress=told.append)
        again = {key_of(o, m) for o, m, _ in AGAIN}
        assert sorted(self.merged) == sorted(key for key in told if key in again)
        return sorted(told)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def test_rows_are_what_merge_features_says_of_the_same_merges(pointed):
    rows, said = read(write_merge_features(pointed, make_tier()))
    assert {*rows} == {f"{key_of(o, m)}|{name}" for o, m, _ in MERGES for name in m}
    assert said["level"] == "points" and said["version"] == "1" and len(said["digest"]) == 64
    same = [m for m in MERGES if m[0] not in ("regmean-1", "swapped")]
    asked = [
        mpf.Merge(list(m), OPERATORS[o].method, w, OPERATORS[o].rank, OPERATORS[o].arguments)
        for o, m, w in same
    ]
    table = mpf.merge_features(
        paths(pointed), asked, calibration=pointed / "calibration" / "12", domains=domains()
    )
    columns = {name: table[name] for name in level_columns("points")}
    place = {(int(n), m): at for at, (n, m) in enumerate(zip(table["merge"], table["member"],
                                                           strict=True))}  # fmt: skip
    told = 0
    for n, (operator, members, _) in enumerate(same):
        for member in members:
            row = rows[f"{key_of(operator, members)}|{member}"]
            assert differing(row, "final", columns, place[n, member]) == set()
            other = place[n, members[members.index(member) - 1]]  # a planted fault: another member
            told += len(differing(row, "final", columns, other)) > 20
    assert told == sum(len(m) for _, m, _ in same)


@pytest.mark.parametrize(
    ("operator", "members", "count", "learnt"),
    [("regmean-1", "ab", 1, ["math", "code"]), ("swapped", "ba", 12, ["math", "code"])],
)
def test_operators_learn_from_their_calibration_and_are_described_on_the_largest(
    pointed, operator, members, count, learnt
):
    rows, _ = read(write_merge_features(pointed, make_tier()))
    zoo, rank = mpf.open_zoo(paths(pointed)), OPERATORS[operator].rank
    largest = pointed / "calibration" / "12"
    tables = merge_tables(zoo, open_recorded(zoo, largest, domains()))
    own = [sorted(ADAPTERS).index(name) for name in members]

    def of(count, learnt):
        merged = mpf.merge(
            [pointed / "adapters" / name for name in members], "regmean", [1.0, 1.0], rank,
            calibration=pointed / "calibration" / str(count), domains=learnt, dtype="F32",
        )  # fmt: skip
        return {name: column[0] for name, column in tables.of_merged([(own, merged)]).items()}

    wrong = {(13 - count, tuple(learnt)), (count, tuple(reversed(learnt)))}
    for at, member in enumerate(members):
        row = rows[f"{key_of(operator, members)}|{member}"]
        assert differing(row, "final", of(count, learnt), at) == set()
        for other in wrong:
            assert len(differing(row, "final", of(*other), at)) > 5


def test_sums_of_known_weights_are_described_early_and_nothing_else_is(pointed):
    rows, said = read(write_merge_features(pointed, make_tier()))
    assert json.loads(said["left_out"]) == {
        "at5%": {"missing": 2, "too_early": 0}, "at10%": {"missing": 1, "too_early": 0}
    }  # fmt: skip
    blind = pointed / "blind"  # the calibration without points
    shutil.copytree(pointed / "calibration" / "12", blind)
    for path in blind.glob("points.*"):
        path.unlink()
    early = {5: {"sum(a+b)"}, 10: {"sum(a+b)", "sum(b+c+a)", "mean(c+a)"}}
    names = level_columns("calibration")
    for step, keys in early.items():
        for operator, members, weights in MERGES:
            key = key_of(operator, members)
            if key not in keys:
                for member in members:
                    row = rows[f"{key}|{member}"]
                    assert {row[f"at{step}%:{name}"] for name in names} == {None}
                continue
            zoo = [pointed / "probes" / n / f"step-{step:07d}" for n in members]
            table = mpf.merge_features(zoo, [mpf.Merge([0, 1, 2][: len(zoo)], weights=weights)],
                                       calibration=blind, domains=domains(members))  # fmt: skip
            columns = {name: table[name] for name in names}
            for at, member in enumerate(members):
                row = rows[f"{key}|{member}"]
                # Of another zoo: float32 sums in another order.
                for name in names:
                    value, truth = row[f"at{step}%:{name}"], columns[name][at]
                    if value is None:
                        assert np.isnan(truth), name
                    else:
                        assert value == pytest.approx(truth, rel=1e-4, abs=1e-6), name
                assert row[f"at{step}%:member_norm"] < 0.9 * row["final:member_norm"]


def test_without_calibration_or_probes_there_is_what_weights_say(made):
    shutil.rmtree(made / "calibration")
    shutil.rmtree(made / "probes")
    write_labels(made, [m for m in MERGES if "regmean" not in m[0] and m[0] != "swapped"])
    rows, said = read(write_merge_features(made, make_tier()))
    assert said["level"] == "weights" and said["left_out"] == "{}"
    names = {name for name in rows["sum(a+b)|a"] if ":" in name}
    assert names == {f"final:{name}" for name in level_columns("weights")}
    write_labels(made, [])
    empty = pq.read_table(write_merge_features(made, make_tier()))
    assert empty.num_rows == 0 and empty.column_names[0] == "row"


def test_any_number_of_threads_gives_the_same_bytes(pointed):
    one = write_merge_features(pointed, make_tier(), threads=1).read_bytes()
    (pointed / merge_features.NAME).unlink()
    assert write_merge_features(pointed, make_tier(), threads=2).read_bytes() == one


def test_what_is_there_is_not_computed_again(made, counted):
    everything = sorted(key_of(o, m) for o, m, _ in MERGES)
    write_labels(made, MERGES[:-1])
    assert counted.by(made) == sorted(key_of(o, m) for o, m, _ in MERGES[:-1])
    write_labels(made, MERGES)
    assert counted.by(made) == ["swapped(b+a)"]
    path, tables = made / merge_features.NAME, counted.tables
    grown = path.read_bytes()
    assert counted.by(made) == [] and counted.tables == tables and path.read_bytes() == grown
    # Whole from the start, it would be the same.
    path.unlink()
    assert counted.by(made) == everything and path.read_bytes() == grown
    # A number that is wrong there shows that it is read.
    table = pq.read_table(path)
    wrong = pa.array([7.5] * table.num_rows, pa.float32())
    place = table.column_names.index("final:size")
    pq.write_table(table.set_column(place, "final:size", wrong), path)
    write_labels(made, MERGES[2:])
    assert counted.by(made) == []
    rows, _ = read(path)
    assert {row["final:size"] for row in rows.values()} == {7.5}
    assert not any(row.startswith("sum(a+b)") for row in rows)  # its labels are gone


def of_members(*names):
    return sorted(key_of(o, m) for o, m, _ in MERGES if {*names} & {*m})


def test_rows_of_anything_that_changed_are_computed_again(made, counted, rng):
    everything = counted.by(made)
    write_adapter(made, "d", 77)
    assert counted.by(made) == of_members("d")
    changed = [(o, m, (0.2, 0.3) if (o, m) == ("ties", "ab") else w) for o, m, w in MERGES]
    write_labels(made, changed)
    assert counted.by(made) == ["ties(a+b)"]
    tier = make_tier(ties=replace(OPERATORS["ties"], arguments={"density": 0.7}))
    assert counted.by(made, tier) == ["ties(a+b)"]
    write_calibration(made, 1, rng)
    assert counted.by(made, tier) == ["regmean-1(a+b)"]
    sizes = {m: SIZES[m] for m in ADAPTERS["c"][1]}
    shutil.rmtree(made / "probes" / "c")
    make_run(made / "probes" / "c", rng, sizes, steps=(10,), name="c")
    early = ["mean(c+a)", "sum(b+c+a)"]
    assert counted.by(made, tier) == early
    write_calibration(made, 12, rng)
    assert counted.by(made, tier) == everything
    shutil.rmtree(made / "probes")  # other columns
    assert counted.by(made, tier) == everything
    path = made / merge_features.NAME
    right = pq.read_table(path)
    for digest in ("0" * 64, ""):
        pq.write_table(right.replace_schema_metadata({"version": "1", "digest": digest}), path)
        assert counted.by(made, tier) == everything
    path.write_bytes(b"no parquet")
    assert counted.by(made, tier) == everything
    assert counted.by(made, tier) == []


def test_another_definition_of_columns_makes_all_rows_again(made, counted, monkeypatch):
    everything = counted.by(made)
    monkeypatch.setattr(merge_features, "_sources", lambda: ["changed"])
    assert counted.by(made) == everything


def test_an_interrupted_call_leaves_what_it_had_and_the_next_goes_on(made, counted):
    whole = write_merge_features(made, make_tier()).read_bytes()
    path = made / merge_features.NAME
    everything = sorted(key_of(o, m) for o, m, _ in MERGES)
    path.unlink()
    told = []

    def stop(key: str) -> None:
        told.append(key)
        if len(told) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_merge_features(made, make_tier(), progress=stop)
    assert merge_feature_file.described(path) == {*told} and len({*told}) == 7
    assert counted.by(made) == sorted({*everything} - {*told})
    assert path.read_bytes() == whole


def test_long_runs_write_what_they_have(made, monkeypatch):
    monkeypatch.setattr(merge_feature_file, "_OFTEN", -1.0)
    path, seen = made / merge_features.NAME, []
    write_merge_features(
        made, make_tier(), progress=lambda key: seen.append(len(merge_feature_file.described(path)))
    )
    assert seen[-len(AGAIN) :] == [len(MERGES) - len(AGAIN) + n + 1 for n in range(len(AGAIN))]
    assert all(one <= two for one, two in pairwise(seen))


def test_labels_that_are_not_of_the_tier_are_refused_by_name(made):
    row = "sum(a+b)|a"
    for changes, key in (
        ({"operator": "median"}, row), ({"rank": 3}, row), ({"method": "svd"}, row),
        ({"calibration": 12}, row), ({"weights": [1.0]}, row), ({"weights": None}, row),
        ({"members": ["a", "stranger"]}, "stranger"),
    ):  # fmt: skip
        write_labels(made, MERGES[:1], **changes)
        with pytest.raises(InputError) as caught:
            write_merge_features(made, make_tier())
        assert caught.value.key == key and not (made / merge_features.NAME).exists()
    (made / "labels.parquet").unlink()
    with pytest.raises(InputError, match=r"labels\.parquet"):
        write_merge_features(made, make_tier())


def test_a_run_describes_what_it_measured_and_pays_once(tmp_path, monkeypatch):
    """What an operator refused has no row, nor what routers chose; the plan says what is left."""
    torch.set_num_threads(1)
    base, out, told = make_base_folder(tmp_path / "base"), tmp_path / "run", []
    tier = make_tiny_tier("sum", "swapped")
    bad = MergePlan("swapped", ("math-a", "math-b"))  # nothing to swap
    tier = replace(tier, merges={**tier.merges, bad.key: bad})
    plan = run(tier, out, base=base, jobs=1,
               progress=lambda *line: told.append(line)).plan  # fmt: skip
    assert plan.count(FEATURES) == len(tier.merges)
    described = [line for line in told if line[0] == FEATURES]
    assert {key for _, key, _ in described} == tier.merges.keys() - {bad.key}
    assert all(seconds == plan.described[key] > 0 for _, key, seconds in described)
    rows, said = read(out / merge_features.NAME)
    labels = read_labels(out / "labels.parquet")
    assert {*rows} == {r["row"] for r in labels if r["study"] != "routing"} < {
        r["row"] for r in labels
    }  # fmt: skip
    assert not any(row.startswith(bad.key) for row in rows) and said["level"] == "points"
    before = (out / merge_features.NAME).read_bytes()
    left = look(tier, out)
    assert left.count(FEATURES) == 1 and left.done[FEATURES] == len(tier.merges) - 1
    monkeypatch.setattr(merge_features, "merge_tables", None)
    run(tier, out, base=base, jobs=1)
    assert (out / merge_features.NAME).read_bytes() == before
