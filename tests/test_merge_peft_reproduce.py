"""Rows of a bank computed again: the same, and noticed where they are not."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
from tiny_tier import make_base_folder, make_tier  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft import tiers  # noqa: E402
from mergeprobe_fast.merge_peft.labels import write_labels  # noqa: E402
from mergeprobe_fast.merge_peft.reproduce import draw, main, merge_key, read_bank  # noqa: E402
from mergeprobe_fast.merge_peft.run import run  # noqa: E402


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A base model and the labels of a run of it."""
    folder = tmp_path_factory.mktemp("bank")
    base, tier = make_base_folder(folder / "base"), make_tier("sum", "regmean-1")
    run(tier, folder / "run", base=base, jobs=1, until="merges")
    return base, write_labels(folder / "run", tier)


@pytest.fixture(autouse=True)
def tiny_tiers(monkeypatch):
    made = {"tiny-test": lambda seed: make_tier("sum", "regmean-1", seed=seed)}
    monkeypatch.setattr(tiers, "TIERS", made)


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


@pytest.mark.parametrize(
    ("column", "change"),
    [("loglik_merged", lambda x: x + 0.01), ("loglik_single", lambda x: x - 0.003),
     ("ll_norm", lambda x: None if x else 0.5), ("train_lr", lambda x: x * 1.001),
     ("utility_single", lambda x: x - 0.2)],
)  # fmt: skip
def test_a_row_that_says_something_else_is_found(bank, tmp_path, capsys, column, change):
    base, path = bank
    wrong = rewritten(path, tmp_path / "bank.parquet", **{column: change})
    assert main([str(wrong), "--rows", "1", "--base", str(base), "--jobs", "1"]) == 1
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if "DIFFERENT" in line)
    assert line.split()[0].rstrip(":") == column and "differences" in told


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
