"""Labels of a run and their errors, against the definitions in loops."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_journal, make_tier, write_lines
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.model.base import WHEEL_NAME
from mergeprobe_fast.merge_peft.outcome import noise
from mergeprobe_fast.merge_peft.outcome.kept import kept, single_gains
from mergeprobe_fast.merge_peft.outcome.labels import (
    COLUMNS,
    compare_rows,
    label_rows,
    read_labels,
    read_scores,
    write_labels,
)
from mergeprobe_fast.merge_peft.outcome.noise import Bootstrap, counts_of
from mergeprobe_fast.merge_peft.outcome.scores import Asked, Measured
from mergeprobe_fast.merge_peft.tiers.plan import Tier

SPREAD, EXACT = bound("bootstrap"), bound("resamples")


def plain_utility(correct: list[bool], refuse: list[int]) -> float:
    """By the words of ``evaluate.Scores.utility``."""
    others = [c for c, r in zip(correct, refuse, strict=True) if r < 0]
    sides = [[c for c, r in zip(correct, refuse, strict=True) if r == side] for side in (0, 1)]
    asked = [side for side in sides if side]
    balanced = sum(sum(side) / len(side) for side in asked) / len(asked) if asked else 0.0
    return (sum(others) + balanced * sum(map(len, asked))) / len(correct)


def draw_items(rng: np.random.Generator, n: int = 60) -> tuple[list[str], np.ndarray]:
    """Keys of which some come up to four times, and refusal marks of all three kinds."""
    keys = [f"key{k}" for k in rng.integers(n // 2, size=n)]
    return keys, rng.integers(-1, 2, size=n).astype(np.int8)


def test_resamples_are_what_a_loop_over_drawn_items_gives(rng: np.random.Generator) -> None:
    keys, refuse = draw_items(rng)
    correct, loglik = rng.random(60) < 0.6, rng.normal(-1, 1, 60)
    boot = Bootstrap(keys, refuse, "a row", resamples=40)
    utility, mean = boot.utility(correct), boot.mean(loglik)
    assert utility.value == pytest.approx(plain_utility(list(correct), list(refuse)), abs=EXACT)
    assert mean.value == pytest.approx(sum(loglik) / 60, abs=EXACT)
    clusters = list(dict.fromkeys(keys))
    for r, counts in enumerate(counts_of(len(clusters), "a row", 40)):
        drawn = []
        for cluster, times in zip(clusters, counts, strict=True):
            drawn += [n for n in range(60) if keys[n] == cluster] * int(times)
        u = plain_utility([correct[n] for n in drawn], [refuse[n] for n in drawn])
        assert utility.draws[r] == pytest.approx(u, abs=EXACT)
        m = sum(float(loglik[n]) for n in drawn) / len(drawn)
        assert mean.draws[r] == pytest.approx(m, abs=EXACT)


def test_utility_is_the_one_of_the_evaluation(rng: np.random.Generator) -> None:
    pytest.importorskip("torch")
    from mergeprobe_fast.merge_peft.stages.evaluate import Scores

    for sides in ((-1,), (0, 1), (1,), (-1, 0, 1), (-1, 0)):
        refuse = rng.choice(sides, 40).astype(np.int8)
        correct, zeros = rng.random(40) < 0.5, np.zeros(40)
        found = Bootstrap([str(n) for n in range(40)], refuse, "x", 5).utility(correct)
        expected = Scores(zeros, zeros, correct, refuse).utility
        assert found.value == pytest.approx(expected, abs=EXACT)


def test_every_resample_is_as_large_as_the_whole_and_has_a_name() -> None:
    counts = counts_of(37, "one")
    assert (counts.sum(1) == 37).all() and counts.shape == (noise.RESAMPLES, 37)
    assert np.array_equal(counts, counts_of(37, "one"))
    assert not np.array_equal(counts, counts_of(37, "two"))
    # Each is there Binomial(n, 1/n) times: variance 1 - 1/n, over 37,000 nearly independent ones.
    assert counts.var() == pytest.approx(1 - 1 / 37, abs=0.05)


def test_the_error_is_that_of_clusters_and_not_of_items(rng: np.random.Generator) -> None:
    of_cluster = rng.normal(0, 1, 50)
    values, keys = np.repeat(of_cluster, 4), [str(n // 4) for n in range(200)]
    refuse = np.full(200, -1)
    known = of_cluster.std() / math.sqrt(50)
    assert Bootstrap(keys, refuse, "row").mean(values).se == pytest.approx(known, rel=SPREAD)
    alone = Bootstrap([str(n) for n in range(200)], refuse, "row").mean(values).se
    assert alone != pytest.approx(known, rel=SPREAD)  # the fault: half of it
    assert alone == pytest.approx(known / 2, rel=SPREAD)


def test_what_two_runs_share_has_no_error(rng: np.random.Generator) -> None:
    keys, refuse = draw_items(rng)
    boot = Bootstrap(keys, refuse, "row")
    hard = rng.normal(0, 3, 60)
    one, two = boot.mean(hard), boot.mean(hard + 0.5)
    assert (two - one).se == pytest.approx(0, abs=EXACT) and one.se > 0.1
    assert (two - one).value == pytest.approx(0.5)
    assert one.over(one).se == pytest.approx(0, abs=EXACT)
    unpaired = two - Bootstrap(keys, refuse, "another").mean(hard)  # the fault
    assert unpaired.se > 0.1


def test_a_ratio_has_the_error_of_its_resamples_where_they_have_one(
    rng: np.random.Generator,
) -> None:
    boot = Bootstrap([str(n) for n in range(400)], np.full(400, -1), "row")
    top, bottom = boot.mean(rng.normal(2, 1, 400)), boot.mean(rng.normal(5, 1, 400))
    ratio = top.over(bottom)
    assert ratio.value == top.value / bottom.value
    # Of second order: the relative error of the denominator, 1 %.
    assert ratio.se == pytest.approx((top.draws / bottom.draws).std(ddof=1), rel=0.03)
    assert ratio.interval == pytest.approx(
        tuple(np.percentile(top.draws / bottom.draws, (2.5, 97.5))), abs=0.002
    )
    noise_of_items = rng.normal(0, 1, 400)
    near = boot.mean(noise_of_items - noise_of_items.mean() + 0.1)  # two standard errors from 0
    assert (1 / near.draws).std() > boot.mean(np.ones(400)).over(near).se
    assert top.over(boot.mean(np.zeros(400))) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tier, list[dict[str, Any]]]:
    folder, tier = tmp_path_factory.mktemp("run"), make_tier(adapters=10, pairs=4)
    return folder, tier, make_journal(folder, tier)


def test_labels_are_what_the_journal_says_by_definition(run) -> None:
    folder, tier, lines = run
    rows = read_labels(write_labels(folder, tier))
    scores = {(s["key"], s["exam"]): s for s in lines if s["kind"] == "scores"}
    refuse = {s["exam"]: s["refuse"] for s in lines if s["kind"] == "exam"}
    merged = [s for s in lines if s["kind"] == "merged"]
    assert [r["row"] for r in rows] == sorted({r["row"] for r in rows})
    by_row = {r["row"]: r for r in rows}
    for line in merged:
        for member in line["members"]:
            row, exam = by_row[f"{line['key']}|{member}"], tier.adapters[member].exam
            of = {"base": scores["base", exam], "single": scores[f"single({member})", exam],
                  "merged": scores[line["key"], exam]}  # fmt: skip
            u = {k: plain_utility(s["correct"], refuse[exam]) for k, s in of.items()}
            ll = {k: sum(s["loglik"]) / len(s["loglik"]) for k, s in of.items()}
            for k in of:
                assert row[f"utility_{k}"] == pytest.approx(u[k], abs=EXACT)
                assert row[f"loglik_{k}"] == pytest.approx(ll[k], abs=EXACT)
            normal = (ll["merged"] - ll["base"]) / (ll["single"] - ll["base"])
            assert row["ll_norm"] == pytest.approx(normal, rel=1e-9)
            assert row["prob_ret"] == pytest.approx(math.exp(ll["merged"] - ll["single"]), rel=1e-9)
            assert row["retention"] == pytest.approx(u["merged"] / u["single"], rel=1e-9)
            assert (row["members"], row["member"]) == (line["members"], member)
            other = next((m for m in line["members"] if m != member), None)
            assert row["partner"] == (other if len(line["members"]) == 2 else None)
            assert row["operator"] == line["operator"] and row["study"] == line["study"]
            assert row["train_steps"] == tier.adapters[member].recipe.steps
    routed = [r for r in rows if r["study"] == "routing"]
    assert len(rows) == sum(len(line["members"]) for line in merged) + len(routed)
    assert len(routed) == 10 and {r["resident"] for r in routed} == {5}
    assert all(r["resident"] == 1 for r in rows if r["study"] != "routing")
    assert list(rows[0]) == list(COLUMNS)


def test_the_errors_of_labels_are_bootstrap_ones_of_all_three_runs(run) -> None:
    folder, tier, _ = run
    found = read_scores(folder)
    row = next(r for r in label_rows(found, tier) if r["ll_norm"] is not None and r["partner"])
    base, single, merged = (
        found.scores[key, row["exam"]].loglik
        for key in ("base", f"single({row['member']})", row["row"].split("|")[0])
    )
    keys = found.exams[row["exam"]].keys
    clusters = list(dict.fromkeys(keys))
    ratios = []
    for counts in counts_of(len(clusters), row["row"]):
        times = np.array([counts[clusters.index(key)] for key in keys])
        b, s, m = ((times * run).sum() / times.sum() for run in (base, single, merged))
        ratios.append((m - b) / (s - b))
    assert row["ll_norm_se"] == pytest.approx(np.std(ratios, ddof=1), rel=0.05)


def test_nothing_is_divided_by_a_gain_that_is_not_there(run, tmp_path: Path) -> None:
    _, tier, lines = run
    key = next(s["key"] for s in lines if s["kind"] == "merged" and len(s["members"]) == 2)
    member = tier.merges[key].members[0]
    exam = tier.adapters[member].exam
    base = next(s for s in lines if (s.get("key"), s.get("exam")) == ("base", exam))
    for shift, noisy, wanted in ((-1.0, 0.0, False), (0.0, 1.0, False), (1.0, 0.0, True)):
        changed = [dict(line) for line in lines]
        for line in changed:
            if line.get("key") == f"single({member})":
                wave = noisy * np.where(np.arange(len(base["loglik"])) % 2, 1.0, -1.0)
                line["loglik"] = (np.array(base["loglik"]) + shift + wave).tolist()
                line["correct"] = [0] * len(base["loglik"])
        write_lines(tmp_path, changed)
        rows = {r["row"]: r for r in label_rows(read_scores(tmp_path), tier)}
        row = rows[f"{key}|{member}"]
        assert (row["ll_norm"] is not None) == wanted == (row["ll_norm_se"] is not None)
        assert row["retention"] is None and row["retention_se"] is None
        assert row["prob_ret"] is not None


def test_whether_a_gain_is_sure_is_the_same_in_every_merge(rng: np.random.Generator) -> None:
    n = 96
    exam = Asked("math", "", tuple(map(str, range(n))), np.full(n, -1, np.int8))
    wave = rng.normal(size=n)
    wave = (wave - wave.mean()) / wave.std() * math.sqrt(n)  # its mean has a standard error of 1
    right = np.zeros(n, bool)
    base = Measured(np.zeros(n), np.zeros(n), right)
    by_row, answers = set(), set()
    for gain in (1.8, 1.96, 2.0, 2.04, 2.25):
        single = Measured(wave + gain, wave + gain, right)
        merged = Measured(single.loglik / 2, single.loglik / 2, right)
        names = [f"operator{k}(math-0+code-0)|math-0" for k in range(50)]
        rows = [kept(base, single, merged, exam, "math-0", name) for name in names]
        for measure in ("ll_norm", "option_norm"):
            there = {row[measure] is not None for row in rows}
            assert len(there) == 1
            answers |= there
        draws = [Bootstrap(exam.keys, exam.refuse, name).mean(single.loglik) for name in names]
        by_row |= {tuple(sorted({draw.sure for draw in draws}))}
    assert answers == {False, True}
    assert (False, True) in by_row  # the fault: each row's own draws


def test_the_same_journal_gives_the_same_bytes_in_any_order(run, tmp_path: Path) -> None:
    folder, tier, lines = run
    first = write_labels(folder, tier).read_bytes()
    assert write_labels(folder, tier).read_bytes() == first
    merged = [line for line in lines if line["kind"] in ("merged", "routed")]
    rest = [line for line in lines if line["kind"] not in ("merged", "routed")]
    write_lines(tmp_path, [*rest, *reversed(merged)])
    assert write_labels(tmp_path, tier).read_bytes() == first


def test_a_run_that_stopped_has_the_rows_it_measured(run, tmp_path: Path) -> None:
    folder, tier, lines = run
    whole = {r["row"]: r for r in label_rows(read_scores(folder), tier)}
    for cut in (40, 60, len(lines) - 1):
        write_lines(tmp_path, lines[:cut])
        with open(tmp_path / "journal.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(lines[cut])[:-3])  # torn: no line end
        part = {r["row"]: r for r in label_rows(read_scores(tmp_path), tier)}
        assert part.items() <= whole.items() and len(part) < len(whole)


def test_the_command_of_a_row_names_a_merge_of_the_tier(run) -> None:
    folder, tier, _ = run
    for row in label_rows(read_scores(folder), tier):
        words = shlex.split(row["command"])
        assert words[:6] == ["mergeprobe-fast", "merge-peft", "--tier", "made", "--seed", "3"]
        if row["study"] == "routing":
            assert "--only" not in words
            continue
        part = tier.only([words[words.index("--only") + 1]])
        assert next(iter(part.merges.values())).members == tuple(row["members"])


def test_the_command_of_a_row_asks_for_what_the_run_was_given(run) -> None:
    folder, tier, _ = run
    found = read_scores(folder)

    def commands(base: str, tier: Tier) -> list[str]:
        of = replace(found, facts={**found.facts, "base": base})
        return [row["command"] for row in label_rows(of, tier)]

    published = {name: replace(exam, data="folder") for name, exam in tier.exams.items()}
    published = replace(tier, exams=published)
    assert not any(" --base" in c or " --data" in c for c in commands(WHEEL_NAME, tier))
    assert all(c.endswith(" --base FOLDER --out DIR") for c in commands("mine", tier))
    assert all(c.endswith(" --data FOLDER --out DIR") for c in commands(WHEEL_NAME, published))
    both = " --base FOLDER --data FOLDER --out DIR"
    assert all(c.endswith(both) for c in commands("mine", published))


def test_gains_are_of_the_single_adapters(run) -> None:
    folder, tier, lines = run
    gains = single_gains(read_scores(folder), tier)
    assert [g["adapter"] for g in gains] == list(tier.adapters)
    scores = {(s["key"], s["exam"]): s["loglik"] for s in lines if s["kind"] == "scores"}
    for g in gains:
        single, base = scores[f"single({g['adapter']})", g["exam"]], scores["base", g["exam"]]
        gain = np.mean(single) - np.mean(base)
        assert g["loglik_gain"] == pytest.approx(gain, abs=EXACT) and g["loglik_gain_se"] > 0


def test_scores_that_do_not_fit_their_exam_are_refused(run, tmp_path: Path) -> None:
    lines = run[2]
    last = next(line for line in reversed(lines) if line["kind"] == "scores")
    routed = next(line for line in lines if line["kind"] == "routed")
    merged = next(line for line in lines if line["kind"] == "merged")
    short = {name: last[name][1:] for name in ("loglik", "option_loglik", "correct")}
    for bad, reason in (
        ({**last, **short}, "loglik: .*: expected 48 finite numbers"),
        ({**last, "loglik": [None] * 48}, "loglik: .*: expected 48 finite numbers"),
        ({**last, "loglik": ["one"] * 48}, "could not convert"),
        ({**last, "exam": "none"}, "no exam 'none'"),
        ({k: v for k, v in routed.items() if k != "accuracy"}, "kind routed has no accuracy"),
        ({k: v for k, v in merged.items() if k != "study"}, "kind merged has no study"),
    ):
        write_lines(tmp_path, [*lines, bad])
        with pytest.raises(InputError, match=rf"journal\.jsonl: .*{reason}"):
            read_scores(tmp_path)


def test_another_tier_or_a_file_that_has_no_labels_is_refused(run, tmp_path: Path) -> None:
    found = read_scores(run[0])
    with pytest.raises(InputError, match="expected tier made with seed 4"):
        label_rows(found, make_tier(adapters=10, pairs=4, seed=4))
    member = next(m for line in found.merged.values() for m in line["members"] if m[-1] == "1")
    smaller = make_tier(adapters=5, pairs=1, sizes=())
    with pytest.raises(InputError, match="has no adapter"):
        label_rows(found, smaller)
    assert member not in smaller.adapters
    (tmp_path / "labels.parquet").write_text("no")
    with pytest.raises(InputError, match=r"labels\.parquet: cannot be read"):
        read_labels(tmp_path / "labels.parquet")


def test_rows_that_differ_are_told_and_others_are_not(run) -> None:
    folder, tier, _ = run
    rows = label_rows(read_scores(folder), tier)
    tolerance = {"ll_norm": 0.01, "loglik_merged": 1e-3}
    assert compare_rows(rows, rows[::-1], tolerance) == []
    near, *rest = (dict(r) for r in rows)
    near["ll_norm"] += 0.009
    assert compare_rows(rows, [near, *rest], tolerance) == []
    for column, value in (("ll_norm", near["ll_norm"] + 0.01), ("ll_norm", None),
                          ("loglik_merged", float("nan")), ("train_seed", 77)):  # fmt: skip
        found = compare_rows(rows, [{**rows[0], column: value}, *rest], tolerance)
        assert [(d.row, d.column) for d in found] == [(rows[0]["row"], column)]
    assert [d.column for d in compare_rows(rows, rest, tolerance)] == ["row"]


def test_a_tolerance_may_depend_on_the_row_and_lists_go_by_entries(run) -> None:
    rows = label_rows(read_scores(run[0]), run[1])
    rows[0]["weights"] = [0.3, 0.7]
    tolerance = {"weights": 1e-3, "ll_norm": lambda row, again: 0.1 * abs(again["loglik_single"])}
    near, *rest = (dict(row) for row in rows)
    near["weights"] = [near["weights"][0] + 0.9e-3, *near["weights"][1:]]
    near["ll_norm"] += 0.09 * abs(near["loglik_single"])
    assert compare_rows(rows, [near, *rest], tolerance) == []
    for column, value in (
        ("weights", [*near["weights"][:-1], near["weights"][-1] - 1.1e-3]), ("weights", None),
        ("weights", near["weights"][1:]), ("weights", [float("nan")] * len(near["weights"])),
        ("ll_norm", rows[0]["ll_norm"] + 0.11 * near["loglik_single"]),
    ):  # fmt: skip
        found = compare_rows(rows, [{**rows[0], column: value}, *rest], tolerance)
        assert [d.column for d in found] == [column]
