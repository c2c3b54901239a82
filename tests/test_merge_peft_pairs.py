"""Labels beside features: what is left out is counted, and what is known beforehand is complete."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merge_peft.report.charts import number
from mergeprobe_fast.merge_peft.results import foretold
from mergeprobe_fast.merge_peft.study import analysis
from mergeprobe_fast.merge_peft.study.pairs import EXAM, read_pairs
from mergeprobe_fast.merge_peft.study.predictors import (
    BOTH,
    METADATA,
    NAMES,
    PAIR_MEAN,
    predictors,
)

DOMAINS = ("math", "code", "science", "safety")


def write_run(folder: Path, rng, *, each=6, noise=0.03, alone=()) -> dict[str, str]:
    """Labels and features of all pairs across domains, each domain of two exams; adapter -> exam.

    A label is its exam's own and noise; the base loss, the signal, is the exam's too.
    Adapters that are ``alone`` are partners only, as if they had not been measured by themselves.
    """
    exam_of = {f"{d}-{k}": f"{d}-{'ab'[k % 2]}" for d in DOMAINS for k in range(each)}
    effect, loss = {}, {}
    for domain in DOMAINS:
        middle, apart = rng.normal(), rng.choice([-1, 1])
        for letter, sign in (("a", -1), ("b", 1)):
            effect[f"{domain}-{letter}"] = middle + sign * apart
            loss[f"{domain}-{letter}"] = rng.normal()
    labels, features = [], []
    for pair in combinations(exam_of, 2):
        for victim, partner in (pair, pair[::-1]):
            domain, other = (name.partition("-")[0] for name in (victim, partner))
            if domain == other:
                continue
            exam = exam_of[victim]
            kept = 0.2 * float(effect[exam]) + noise * float(rng.normal())
            features.append({"victim": victim, "partner": partner, "final:base_loss_a": loss[exam],
                             "final:cosine": float(rng.normal())})  # fmt: skip
            if victim in alone:
                continue
            labels.append({
                "row": f"sum({'+'.join(pair)})|{victim}", "operator": "sum", "study": "pairs",
                "member": victim, "partner": partner, "domain": domain, "exam": exam,
                "ll_norm": kept, "ll_norm_se": noise,
                "train_rank": 8, "train_lr": 1e-3, "train_steps": 10 + int(victim[-1]),
                "train_seed": 0, "train_init_seed": 0, "train_layers": [0, 1],
                "train_variant": "lora",
            })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(labels), folder / "labels.parquet")
    pq.write_table(pa.Table.from_pylist(features), folder / "features.parquet")
    return exam_of


def test_rows_are_those_of_the_files(tmp_path, rng):
    exam_of = write_run(tmp_path, rng)
    pairs = read_pairs(tmp_path)
    rows = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    assert [*zip(pairs.victim, pairs.partner, strict=True)] == [(r["member"], r["partner"])
                                                                for r in rows]  # fmt: skip
    np.testing.assert_array_equal(pairs.y, np.clip([r["ll_norm"] for r in rows], -1, 1.2))
    assert pairs.without_partner == 0
    for side, names in (("a", pairs.victim), ("b", pairs.partner)):
        for exam in {*exam_of.values()}:
            told = pairs.metadata[f"{EXAM}{exam}_{side}"]
            assert [*told] == [float(exam_of[name] == exam) for name in names]


def test_rows_beside_a_partner_of_which_nothing_is_known_are_left_out_and_counted(
    tmp_path, rng, monkeypatch
):
    write_run(tmp_path, rng, alone=("code-1", "math-0"))
    rows = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    beside = [r for r in rows if r["partner"] in ("code-1", "math-0")]
    pairs = read_pairs(tmp_path)
    assert pairs.without_partner == len(beside) > 0 and len(pairs) == len(rows) - len(beside)
    assert not {"code-1", "math-0"} & {*pairs.victim, *pairs.partner}
    monkeypatch.setattr(analysis, "SPLITS", ("domain",))  # the fastest
    found = analysis.analyse(tmp_path)
    assert (found["rows"], found["without_partner"]) == (len(pairs), len(beside))


def test_of_partners_that_are_all_unknown_nothing_can_be_read(tmp_path, rng):
    everyone = write_run(tmp_path, rng)
    write_run(tmp_path, rng, alone=[name for name in everyone if not name.startswith("math")])
    with pytest.raises(InputError, match="no ll_norm of sum"):
        read_pairs(tmp_path)


def test_a_signal_that_only_tells_the_exam_adds_nothing_to_metadata(tmp_path, rng):
    """It would, were the exam not among the metadata."""
    write_run(tmp_path, rng)
    pairs = read_pairs(tmp_path)

    def advantage(pairs):
        chosen = [p for p in predictors(pairs) if p.name in (PAIR_MEAN, METADATA, NAMES, BOTH)]
        by_name = {s["name"]: s for s in analysis._scored(pairs, "adapter", chosen)}
        return by_name[BOTH]["over_metadata"]

    unaware = {n: c for n, c in pairs.metadata.items() if not n.startswith(EXAM)}
    assert advantage(pairs) < 0.05
    assert advantage(replace(pairs, metadata=unaware)) > 0.1


def test_what_cannot_be_computed_is_told_as_such(tmp_path, rng):
    """Two adapters a domain: a victim meets two of each, which have no rank correlation."""
    write_run(tmp_path, rng, each=2)
    found = analysis.analyse(tmp_path)
    assert {s["within"] for s in found["splits"]["adapter"]} == {None}
    assert None not in {s["within"] for s in found["splits"]["domain"]}
    text = foretold.section(found, {"predictors": "predictors.svg"})
    table = text[text.index("**The victim's adapter held out**") :]
    row = next(line for line in table.splitlines() if line.startswith(f"| {NAMES} |"))
    assert row.split("|")[3].strip() == number(None)
    (svg,) = foretold.pictures(found).values()
    assert not re.search(r"nan|None", text + svg)
