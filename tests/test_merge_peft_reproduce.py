"""Rows of a bank computed again: the same, and noticed where they are not."""

from __future__ import annotations

import json
import math

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
from tiny_tier import make_base_folder, make_tier  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast import cli  # noqa: E402
from mergeprobe_fast.merge_peft.outcome.labels import (  # noqa: E402
    COLUMNS,
    IDENTITY,
    compare_rows,
    write_labels,
)
from mergeprobe_fast.merge_peft.runs import reproduce  # noqa: E402
from mergeprobe_fast.merge_peft.runs.reproduce import (  # noqa: E402
    TOLERANCE,
    Sample,
    draw,
    main,
    merge_key,
    read_bank,
    recompute,
    table,
)
from mergeprobe_fast.merge_peft.runs.run import run  # noqa: E402
from mergeprobe_fast.merge_peft.tiers import sizes  # noqa: E402

OPERATORS = ("sum", "reweighted", "regmean-1")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A base model and the labels of a run of it."""
    folder = tmp_path_factory.mktemp("bank")
    base, tier = make_base_folder(folder / "base"), make_tier(*OPERATORS)
    run(tier, folder / "run", base=base, jobs=1, until="merges")
    return base, write_labels(folder / "run", tier)


@pytest.fixture(autouse=True)
def tiny_tiers(monkeypatch):
    made = {"tiny-test": lambda seed: make_tier(*OPERATORS, seed=seed)}
    monkeypatch.setattr(sizes, "TIERS", made)


def rewritten(path, out, **change):
    """The bank with columns of its rows changed by functions."""
    table = pyarrow.parquet.read_table(path)
    rows = [{**row, **{c: f(row[c]) for c, f in change.items()}} for row in table.to_pylist()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), out)
    return out


def test_rows_of_a_run_come_out_again(bank, capsys):
    base, path = bank
    given = [str(path), "--rows", "2", "--seed", "4", "--base", str(base), "--jobs", "1"]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "--seed 4: 2 of 2 rows" in told and "no differences" in told and "DIFFERENT" not in told
    chosen = {row["row"] for s in draw(read_bank(path), 2, 4, 240) for row in s.rows}
    assert 2 <= len(chosen) <= 4 and all(name in told for name in chosen)


@pytest.fixture(scope="module")
def again(bank, tmp_path_factory):
    """The rows of a merge by each operator, and the same ones recomputed.

    Random models answer nothing right: utilities are made up, the same on both sides.
    """
    base, path = bank
    tier = make_tier(*OPERATORS)
    keys = [f"{operator}(math-a+case-a)" for operator in OPERATORS]
    rows = [row for row in read_bank(path) if merge_key(row) in keys]
    sample = Sample(tier.only(keys), rows, rows, 0.0)
    found = recompute(sample, tmp_path_factory.mktemp("again"), base=base, jobs=1)
    right = {"utility_base": 10 / 48, "utility_single": 30 / 48, "utility_merged": 24 / 48,
             "retention": 24 / 30, "retention_se": 0.05, "accuracy_norm": 14 / 20,
             "accuracy_norm_se": 0.06}  # fmt: skip
    return [row | right for row in rows], [row | right for row in found]


def test_every_column_that_says_something_is_compared(again):
    rows, found = again
    assert compare_rows(rows, found, TOLERANCE) == []
    assert [c for c in TOLERANCE if all(row[c] is None for row in rows)] == []
    left = {"row", "command", "merge_seconds", "seconds_per_prompt", "routed_right"}
    assert {*IDENTITY, *TOLERANCE} == {*COLUMNS} - left


@pytest.mark.parametrize("column", [*IDENTITY, *TOLERANCE])
def test_a_column_that_says_something_else_is_found(again, column):
    rows, found = again
    for at, row in enumerate(rows):
        for other in others(row[column]):
            wrong = [*rows[:at], {**row, column: other}, *rows[at + 1 :]]
            told = [(d.row, d.column) for d in compare_rows(wrong, found, TOLERANCE)]
            assert (row["row"], column) in told, other
            assert {name for name, _ in told} == {row["row"]}
            lines = table(wrong, found, compare_rows(wrong, found, TOLERANCE))
            assert any(line.endswith("DIFFERENT") and line.split()[0].rstrip(":") == column
                       for line in lines)  # fmt: skip


def others(value):
    """Values that are not this one."""
    if isinstance(value, list):
        return [None, value[:-1], [*value[:-1], value[-1] + (1 if type(value[-1]) is int else "x"
                if type(value[-1]) is str else 2e-3)]]  # fmt: skip
    if isinstance(value, float):
        return [None, value * 1.2 + 0.06, float("nan")]
    return [0.5, "x"] if value is None else [None, value + ("x" if isinstance(value, str) else 1)]


def test_rows_that_rounding_moved_are_the_same(again, rng):
    """Likelihoods moved by what other kernels do to them, and what follows from them with them."""
    rows, found = again
    for _ in range(50):
        moved = []
        for row in rows:
            b, s, m = (row[f"loglik_{which}"] + rng.uniform(-size, size) for which, size in
                       (("base", 1e-5), ("single", 1e-4), ("merged", 1e-3)))  # fmt: skip
            new = {"loglik_base": b, "loglik_single": s, "loglik_merged": m,
                   "prob_ret": math.exp(m - s)}  # fmt: skip
            if row["ll_norm"] is not None:
                new["ll_norm"] = (m - b) / (s - b)
            ub, us, um = (row[f"utility_{which}"] + rng.choice([-1, 0, 1]) / 48 for which in
                          ("base", "single", "merged"))  # fmt: skip
            new |= {"utility_base": ub, "utility_single": us, "utility_merged": um}
            if row["retention"] is not None:
                new["retention"] = um / us
            if row["accuracy_norm"] is not None:
                new["accuracy_norm"] = (um - ub) / (us - ub)
            moved.append({**row, **new})
        assert compare_rows(moved, found, TOLERANCE) == []


def test_a_bank_with_another_number_is_told_by_the_command(bank, tmp_path, capsys):
    base, path = bank
    wrong = rewritten(path, tmp_path / "bank.parquet", loglik_merged=lambda x: x + 0.01)
    assert main([str(wrong), "--rows", "1", "--base", str(base), "--jobs", "1"]) == 1
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if "DIFFERENT" in line)
    assert line.split()[0].rstrip(":") == "loglik_merged" and "differences" in told


def test_a_run_that_fails_is_no_difference(bank, capsys, monkeypatch):
    def dying(*arguments, **options):
        raise mpf.BackendError("its worker ended with exit code -9")

    monkeypatch.setattr(reproduce, "run", dying)
    assert main([str(bank[1]), "--rows", "1", "--base", str(bank[0])]) == 2
    assert "error: its worker ended with exit code -9" in capsys.readouterr().err


def test_a_draw_is_random_repeatable_and_whole_merges(bank):
    rows = read_bank(bank[1])
    seen = set()
    for seed in range(60):
        (sample,) = draw(rows, 2, seed, 240)
        (again,) = draw(rows[::-1], 2, seed, 240)
        assert [r["row"] for r in sample.rows] == [r["row"] for r in again.rows]
        keys = {merge_key(row) for row in sample.rows}
        assert keys == {*sample.tier.merges} and 1 <= len(keys) <= 2
        assert {r["row"] for r in sample.rows} == {r["row"] for r in rows if merge_key(r) in keys}
        assert len(sample.drawn) == 2 and all(row in sample.rows for row in sample.drawn)
        seen |= keys
    assert seen == {merge_key(row) for row in rows if row["method"] != "routing"}


def test_a_budget_is_kept_and_too_small_a_one_is_refused(bank, capsys):
    rows = read_bank(bank[1])
    (all_of_them,) = draw(rows, len(rows), 0, 1e9)
    assert len(all_of_them.rows) == sum(row["method"] != "routing" for row in rows)
    (part,) = draw(rows, len(rows), 0, all_of_them.seconds / 2)
    assert part.seconds <= all_of_them.seconds / 2
    assert 0 < len(part.rows) < len(all_of_them.rows)
    with pytest.raises(mpf.InputError, match="none of"):
        draw(rows, 1, 0, 1e-6)
    assert main([str(bank[1]), "--budget-seconds", "1e-6"]) == 2
    assert "budget-seconds: none of" in capsys.readouterr().err


def test_routed_rows_are_not_drawn(bank):
    rows = [row for row in read_bank(bank[1]) if row["method"] == "routing"]
    assert rows
    with pytest.raises(mpf.InputError, match="none of 0 rows"):
        draw(rows, 1, 0, 240)


def test_what_is_no_bank_is_refused(tmp_path, bank, capsys):
    (tmp_path / "text.parquet").write_text("not a table")
    assert main([str(tmp_path / "text.parquet")]) == 2
    assert main([str(tmp_path / "missing.parquet")]) == 2
    table = pyarrow.parquet.read_table(bank[1]).drop_columns(["ll_norm"])
    pyarrow.parquet.write_table(table, tmp_path / "short.parquet")
    assert main([str(tmp_path / "short.parquet")]) == 2
    assert "ll_norm: has no such column" in capsys.readouterr().err
    other = rewritten(bank[1], tmp_path / "other.parquet", members=lambda m: [*m[::-1]])
    assert main([str(other)]) == 2 and "no such merge" in capsys.readouterr().err
    assert main([str(bank[1]), "--rows", "0"]) == 2


def test_the_command_prints_json_and_says_by_its_exit_code_what_it_found(bank, tmp_path, capsys):
    base, path = bank
    wrong = rewritten(path, tmp_path / "wrong.parquet", loglik_merged=lambda x: x + 0.01)
    options = ["--rows", "1", "--base", str(base), "--jobs", "1", "--json"]
    for given, code in ((path, 0), (wrong, 1)):
        assert cli.main(["reproduce", str(given), *options]) == code
        found = json.loads(capsys.readouterr().out)
        assert bool(found["differences"]) == bool(code) and "rows" in found["told"][0]
    assert cli.main(["reproduce", str(tmp_path / "none.parquet")]) == 2
    assert "none.parquet" in capsys.readouterr().err
