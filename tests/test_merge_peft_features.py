"""Features beside the labels of a run, against those of each pair on its own."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter
from calibrations import make_calibration, make_points
from probes import make_run

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.merge_peft.outcome.features import write_features
from mergeprobe_fast.merge_peft.results import foretold
from mergeprobe_fast.merge_peft.study.pairs import read_pairs
from mergeprobe_fast.merge_peft.study.predictors import PHYSICS, is_of_weights
from mergeprobe_fast.merge_peft.tiers.plan import AdapterPlan, Exam, Tier
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe

LOW, HIGH, MORE = (f"model.layers.{i}.self_attn.q_proj" for i in range(3))
SIZES = {LOW: (12, 10, 3), HIGH: (12, 10, 3), MORE: (9, 10, 2)}
# Name -> its exam and the modules it has; "apart" shares none with "one".
ADAPTERS = {
    "one": ("math", (LOW,)),
    "two": ("code", (LOW, HIGH)),
    "apart": ("code", (HIGH, MORE)),
    "late": ("math", (LOW, HIGH, MORE)),
}
SNAPSHOTS = {"one": (5, 10), "two": (5, 10), "apart": (2, 10)}  # of 100 steps; "late" has none
MERGES = [
    ("pairs", ("one", "two")), ("pairs", ("one", "apart")), ("sets", ("two", "apart", "late")),
    ("routing", ("one", "late")),
]  # fmt: skip
# The same float32 sums in another order, and rounded to float32 in the file.
SAME = {"rel": 1e-4, "abs": 1e-6}


def make_tier() -> Tier:
    exams = {name: Exam(name, name) for name in ("math", "code")}
    adapters = {name: AdapterPlan(name, exam, Recipe(exam)) for name, (exam, _) in ADAPTERS.items()}
    return Tier("test", "", 0, exams, adapters, {}, {})


@pytest.fixture
def made(rng, tmp_path):
    """A run folder with all that features are made from, and its adapters' truth."""
    truth = {}
    for seed, (name, (_, modules)) in enumerate(ADAPTERS.items()):
        truth[name] = make_adapter(
            tmp_path / "adapters" / name, {m: SIZES[m] for m in modules}, seed=seed,
            rank=seed + 1, dtype="BF16",
        )  # fmt: skip
    for name, steps in SNAPSHOTS.items():
        sizes = {m: SIZES[m] for m in ADAPTERS[name][1]}
        make_run(tmp_path / "probes" / name, rng, sizes, steps=steps, name=name)
    for count in (1, 12):
        folder = tmp_path / "calibration" / str(count)
        shapes = {m: (o, i) for m, (o, i, _) in SIZES.items()}
        make_calibration(folder, shapes, {"math": count + 3, "code": count + 3}, rng,
                         gradients=True, labels="both", sequences=count)  # fmt: skip
    opened = [open_adapter(tmp_path / "adapters" / n, name=n) for n in ADAPTERS]
    make_points(tmp_path / "calibration" / "12", opened, [e for e, _ in ADAPTERS.values()], rng)
    write_merges(tmp_path, MERGES)
    return tmp_path, truth


def write_merges(folder, merges):
    rows = [{"study": s, "members": list(members)} for s, members in merges for _ in members]
    pq.write_table(pa.Table.from_pylist(rows), folder / "labels.parquet")


def read(path):
    """(victim, partner) -> column -> value, and the file's metadata."""
    table = pq.read_table(path)
    assert {str(t) for t in table.schema.types} == {"string", "float"}
    rows = {(r["victim"], r["partner"]): r for r in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows, json.loads(table.schema.metadata[b"left_out"])


def test_rows_are_the_ordered_pairs_that_were_merged(made):
    folder, _ = made
    rows, _ = read(write_features(folder, make_tier()))
    merged = {p for s, members in MERGES if s != "routing" for p in permutations(members, 2)}
    assert {*rows} == merged and ("one", "late") not in merged
    assert list(rows) == sorted(rows)
    assert rows["one", "two"]["victim_domain"] == "math"
    assert rows["one", "two"]["partner_domain"] == "code"


def test_a_is_the_victim_and_b_the_partner(made):
    """Against dense deltas, and against tables of a zoo that has the victim before the partner."""
    folder, truth = made
    rows, _ = read(write_features(folder, make_tier()))
    swapped = 0
    for (victim, partner), row in rows.items():
        own, other = truth[victim], truth[partner]
        shared = own.modules.keys() & other.modules.keys()
        inner = sum(float((own.modules[m].delta * other.modules[m].delta).sum()) for m in shared)
        cosine = inner / (own.norm * other.norm)
        assert row["final:cosine"] == pytest.approx(cosine, abs=1e-5)
        assert row["final:norm_a"] == pytest.approx(own.norm, rel=1e-5)
        assert row["final:norm_b"] == pytest.approx(other.norm, rel=1e-5)
        order = [victim, partner, *(n for n in ADAPTERS if n not in (victim, partner))]
        alone = mpf.pair_features(
            [folder / "adapters" / n for n in order],
            calibration=folder / "calibration" / "12", domains=[ADAPTERS[n][0] for n in order],
        )  # fmt: skip
        assert (alone.a[0], alone.b[0]) == (0, 1)
        assert {f"final:{n}" for n in alone if n not in "ab"} <= row.keys()
        for name in alone:
            if name in "ab":
                continue
            value, expected = row[f"final:{name}"], alone[name][0]
            if np.isnan(expected):
                assert value is None, name
            else:
                assert value == pytest.approx(expected, **SAME), name
                other_way = rows[partner, victim][f"final:{name}"]
                swapped += other_way != pytest.approx(expected, **SAME)
    assert swapped > 100  # taking pairs the other way round would show


def test_what_no_module_can_say_is_null_and_not_zero(made):
    folder, _ = made
    rows, _ = read(write_features(folder, make_tier()))
    row = rows["one", "apart"]
    for name in ("row_overlap.mean", "col_capture_a_by_b.max", "row_rv.p10", "cosine.mean",
                 "norm_ratio.max"):  # fmt: skip
        assert row[f"final:{name}"] is None, name
        assert rows["one", "two"][f"final:{name}"] is not None, name
    assert row["final:cosine"] == 0.0  # of whole deltas, which are zero where a module is missing


def test_snapshots_that_are_missing_or_too_early_are_null_and_counted(made):
    folder, _ = made
    rows, left_out = read(write_features(folder, make_tier()))
    assert left_out == {
        "at1%": {"missing": 4, "too_early": 0},
        "at2%": {"missing": 3, "too_early": 1},  # of "apart", whose step 2 is too early
        "at5%": {"missing": 2, "too_early": 0},  # "late", and "apart" was seen at 2 % instead
        "at10%": {"missing": 1, "too_early": 0},
    }
    assert rows["one", "two"]["at5%:cosine"] is not None
    assert rows["one", "apart"]["at5%:cosine"] is None
    assert rows["one", "apart"]["at10%:norm_a"] is not None
    assert rows["two", "late"]["at10%:cosine"] is None
    assert not any(name.startswith("at1%") for name in rows["one", "two"])
    make_run(folder / "probes" / "late", np.random.default_rng(0), {LOW: SIZES[LOW]}, steps=(1, 5),
             name="late")  # fmt: skip
    rows, left_out = read(write_features(folder, make_tier()))
    assert left_out["at1%"] == {"missing": 3, "too_early": 1}
    assert rows["two", "late"]["at5%:norm_b"] is not None


def test_early_columns_are_of_the_snapshots_and_of_nothing_that_came_later(made):
    folder, _ = made
    rows, _ = read(write_features(folder, make_tier()))
    zoo = [folder / "probes" / name / "step-0000005" for name in ("one", "two")]
    alone = mpf.pair_features(zoo, ["cosine", "cross_to_self_a_by_b", "row_capture_a_by_b"],
                              calibration=folder / "calibration" / "12",
                              domains=["math", "code"])  # fmt: skip
    row = rows["one", "two"]
    for name in ("cosine", "cross_to_self_a_by_b", "row_capture_a_by_b", "row_capture_b_by_a"):
        assert row[f"at5%:{name}"] == pytest.approx(alone[name][0], **SAME)
        assert row[f"final:{name}"] != pytest.approx(alone[name][0], **SAME)
    names = {n.partition(":")[2] for n in row if n.startswith("at5%:")}
    assert "probe_gradient_cosine" in names and "probe_loss_a" in names
    # Points and gains were measured with trained weights.
    assert not {n for n in names if "trained" in n or n.startswith(("damage_", "gain"))}
    assert "final:damage_trained_a_by_b" in row and "final:probe_cosine" not in row


def test_what_the_analysis_looks_for_is_there_by_these_names(made):
    """A column of another name would be left out of it without a word."""
    folder, _ = made
    columns = pq.read_schema(write_features(folder, make_tier())).names
    known = {n.partition(":")[2] for n in columns} | {"norm_b_to_a"}
    late = {n for n in columns if n.startswith("final:")} | {"final:effect_trained_a_by_b"}
    assert {*PHYSICS} <= late and {*foretold.NAMED} <= known
    weights = {n for n in late if is_of_weights(n)}
    some = ("cosine", "row_overlap.max", "norm_a", "stable_rank_b")
    assert {f"final:{name}" for name in some} <= weights
    assert not {n for n in weights if "disturbance" in n or "base" in n or "gain" in n}


def test_the_same_run_gives_the_same_bytes(made):
    folder, _ = made
    first = write_features(folder, make_tier()).read_bytes()
    assert write_features(folder, make_tier()).read_bytes() == first
    assert {p.name for p in folder.iterdir()} == {
        "adapters", "probes", "calibration", "labels.parquet", "features.parquet",
    }  # fmt: skip


def test_runs_without_calibration_or_probes_have_what_weights_say(rng, tmp_path):
    for seed, (name, (_, modules)) in enumerate(ADAPTERS.items()):
        make_adapter(tmp_path / "adapters" / name, {m: SIZES[m] for m in modules}, seed=seed)
    write_merges(tmp_path, MERGES[:1])
    rows, left_out = read(write_features(tmp_path, make_tier()))
    assert left_out == {} and {*rows} == {("one", "two"), ("two", "one")}
    assert "final:cosine" in rows["one", "two"]
    assert not any("cross_to_self" in name for name in rows["one", "two"])


def test_a_run_without_merges_has_no_rows(tmp_path):
    schema = pa.schema([("study", pa.string()), ("members", pa.list_(pa.string()))])
    pq.write_table(schema.empty_table(), tmp_path / "labels.parquet")
    table = pq.read_table(write_features(tmp_path, make_tier()))
    assert table.num_rows == 0
    assert table.column_names == ["victim", "victim_domain", "partner", "partner_domain"]


def test_labels_that_are_not_of_the_tier_are_refused_by_name(made):
    folder, _ = made
    write_merges(folder, [("pairs", ("one", "stranger"))])
    with pytest.raises(InputError, match="stranger"):
        write_features(folder, make_tier())
    (folder / "labels.parquet").unlink()
    with pytest.raises(InputError, match=r"labels\.parquet"):
        write_features(folder, make_tier())


LABEL = {
    "study": "pairs", "operator": "sum", "train_rank": 8, "train_lr": 1e-3, "train_steps": 50,
    "train_layers": [1, 2], "train_variant": "lora", "ll_norm_se": 0.1,
}  # fmt: skip


def test_labels_stand_beside_the_features_of_their_pair(tmp_path):
    def label(member, partner, domain, other, value, seed=0, start=0, **changes):
        return {"row": f"{member}|{partner}", "member": member, "partner": partner,
                "members": [member, partner], "exam": domain, "domain": domain, "ll_norm": value,
                "train_seed": seed, "train_init_seed": start} | LABEL | changes  # fmt: skip

    rows = [
        label("m", "c", "math", "code", -9.0), label("c", "m", "code", "math", 0.5, start=1),
        label("again", "c", "math", "code", 0.75, seed=1, train_steps=50),
        label("c", "again", "code", "math", None, start=1),
        label("m", "c", "math", "code", 0.1, study="same"),
        label("long", "c", "math", "code", 0.25, train_steps=99),
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    features = [
        {"victim": v, "partner": p, "final:norm_a": float(n), "final:norm_b": 2.0,
         "final:rank_a": 8.0, "at5%:cosine": None if v == "c" else 0.5}
        for n, (v, p) in enumerate(permutations(("m", "c", "again", "long"), 2))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(features), tmp_path / "features.parquet")
    pairs = read_pairs(tmp_path)
    assert list(pairs.victim) == ["m", "c", "again", "long"]
    np.testing.assert_array_equal(pairs.y, [-1.0, 0.5, 0.75, 0.25])  # clipped
    where = {(f["victim"], f["partner"]): f["final:norm_a"] for f in features}
    norms = [where[v, p] for v, p in zip(pairs.victim, pairs.partner, strict=True)]
    np.testing.assert_array_equal(pairs.signals["final:norm_a"], norms)
    assert np.isnan(pairs.signals["at5%:cosine"]).tolist() == [False, True, False, False]
    assert "final:rank_a" not in pairs.signals  # how it was trained is no signal
    assert pairs.signals["final:norm_b_to_a"][1] == pytest.approx(2.0 / norms[1])
    assert pairs.victim_family[0] == pairs.victim_family[2] != pairs.victim_family[3]
    assert pairs.metadata["shared_init"].tolist() == [0, 0, 0, 0]
    assert pairs.metadata["steps_a"].tolist() == [50, 50, 50, 99]
    pq.write_table(pa.Table.from_pylist(features[:2]), tmp_path / "features.parquet")
    with pytest.raises(InputError, match="has no features"):
        read_pairs(tmp_path)
    with pytest.raises(InputError, match="no ll_norm of ties"):
        read_pairs(tmp_path, operator="ties")
