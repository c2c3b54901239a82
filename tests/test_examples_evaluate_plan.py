"""The example that measures a plan: its items, its numbers against dense weights, its table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from adapters import make_adapter  # noqa: E402
from dense_merge import exact_sums, seed_from  # noqa: E402
from planning_judges import HarmJudge  # noqa: E402
from tiny_bases import WORDS, load, make_base  # noqa: E402
from tolerances import bound  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.tasks.item import Item  # noqa: E402
from mergeprobe_fast.planning.costs import Costs  # noqa: E402
from mergeprobe_fast.planning.result import PlannedAdapter  # noqa: E402
from mergeprobe_fast.planning.zoo_plan import make_plan  # noqa: E402
from mergeprobe_fast.report.plan import write_plan  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
MODULES = {"model.layers.1.mlp.up_proj": (24, 16, 3), "model.layers.2.self_attn.v_proj": (8, 16, 3)}
NAMES = ("math-a", "math-b", "safety", "science-with-a-name-that-is-long")
KEPT = {"math-a": 0.9, "math-b": 0.9}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("evaluate_plan", "exams", "calibrate_data", "smollm2", "tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("evaluate_plan")


@pytest.fixture
def applied(tmp_path, rng, example, monkeypatch):
    """A tiny Llama, a plan that adds the two of math, items that one adapter of each gains on."""
    make_base(tmp_path / "base", seed=seed_from(rng))
    made = {
        name: make_adapter(tmp_path / "zoo" / name, MODULES, seed=seed_from(rng), magnitude=0.5)
        for name in NAMES
    }
    zoo = mpf.open_zoo([m.path for m in made.values()])
    harm = np.full((4, 4), 0.5)
    harm[0, 1] = harm[1, 0] = 0.1
    lack = dict.fromkeys(("reweight", "prune", "regmean"), "a calibration")
    judge = HarmJudge(zoo.names, harm, unavailable=lack)
    adapters = [PlannedAdapter(a.name, str(a.path)) for a in zoo]
    plan = make_plan(judge, adapters, Costs(floor=0.8))
    (tmp_path / "plan").mkdir()
    write_plan(tmp_path / "plan", plan, "mergeprobe-fast plan")
    served = plan.apply(tmp_path / "plan" / "applied", zoo)
    weights = dict(zip(plan.merged[0].members, plan.merged[0].weights, strict=True))
    alone = {name: exact_sums([made[name]], [1.0]) for name in NAMES}
    both = exact_sums([made[n] for n in weights], list(weights.values()))
    serving = {name: both if name in weights else alone[name] for name in NAMES}
    prompts = [" ".join(rng.choice(WORDS, 6)) for _ in range(24)]
    first = {"math": "math-a", "safety": "safety", "science": NAMES[3]}
    items = {}
    for domain, name in first.items():
        found = [logits(tmp_path / "base", deltas, prompts) for deltas in ({}, alone[name])]
        logp = [x - np.logaddexp.reduce(x, axis=1)[:, None] for x in found]
        answers = [WORDS[i] for i in (logp[1] - logp[0])[:, : len(WORDS)].argmax(1)]
        items[domain] = [
            Item(domain, f"{domain}.x", str(n), prompt, target, "exact")
            for n, (prompt, target) in enumerate(zip(prompts, answers, strict=True))
        ]
    monkeypatch.setattr(example, "exam", lambda domain, count: items[domain][:count])
    return SimpleNamespace(
        base=tmp_path / "base", plan=tmp_path / "plan", served=served, alone=alone,
        serving=serving, items=items,
    )  # fmt: skip


def logits(folder, deltas, prompts):
    """(prompts, vocabulary) behind the last word, of weights w + delta summed in float64."""
    model = load(folder, torch.float32)
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_submodule(name).weight
            weight.copy_(torch.tensor(weight.numpy().astype(np.float64) + delta))
        ids = torch.tensor([[WORDS.index(w) for w in p.split()] for p in prompts])
        return model(input_ids=ids).logits[:, -1].double().numpy()


def likelihoods(folder, deltas, items):
    """Of each item's one token, and whether it is the likeliest."""
    found = logits(folder, deltas, [i.prompt for i in items])
    at = [WORDS.index(i.target) for i in items]
    chosen = found[np.arange(len(at)), at]
    return chosen - np.logaddexp.reduce(found, axis=1), found.argmax(1) == at


def test_every_row_is_what_dense_weights_give(applied, example, one_thread):
    domains = {name: name.split("-")[0] for name in NAMES}
    base = example.load_base(applied.base)
    rows = example.measure(applied.served, domains, base, 24, threads=1)
    assert [row["adapter"] for row in rows] == list(NAMES)
    for row in rows:
        name, items = row["adapter"], applied.items[row["domain"]]
        runs = {"base": {}, "single": applied.alone[name], "merged": applied.serving[name]}
        truth = {w: likelihoods(applied.base, d, items) for w, d in runs.items()}
        mean = {w: float(loglik.mean()) for w, (loglik, _) in truth.items()}
        close = 4 * bound("likelihood") * max(10, *(-m for m in mean.values()))
        for which, (_, right) in truth.items():
            assert abs(row[f"loglik_{which}"] - mean[which]) < close
            assert abs(row[f"utility_{which}"] - right.mean()) < 1.01 / 24  # of equals, either
        if row["ll_norm"] is not None:
            gain = mean["single"] - mean["base"]
            kept = (mean["merged"] - mean["base"]) / gain
            assert abs(row["ll_norm"] - kept) < 4 * close / gain
        assert row["predicted"] == pytest.approx(KEPT.get(name, 1.0))
        routed = name not in KEPT
        assert (row["served_by"] == name) == routed == (row["action"] == "route")
    measured = {row["adapter"]: row for row in rows}
    # The items of a domain are those its first adapter gains most on; served alone, all is kept.
    assert measured["math-a"]["ll_norm"] is not None
    for name in ("safety", NAMES[3]):
        assert measured[name]["ll_norm"] == pytest.approx(1, abs=1e-6)
    # The fault: the merge measured on another's items would be told from this.
    assert abs(measured["math-a"]["loglik_merged"] - measured["math-a"]["loglik_single"]) > 1e-3


def test_the_example_is_a_command_and_its_table_fits(applied, example, monkeypatch, capsys):
    given = ["evaluate_plan.py", str(applied.plan), "--base", str(applied.base), "--items", "20"]
    monkeypatch.setattr(sys, "argv", given)
    assert example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines), lines
    assert any(line.startswith("math-a") and "90.0  85 to 93" in line for line in lines), lines
    assert any(line.startswith("safety") and "as it is" in line for line in lines)
    assert "4 adapters, 3 resident." in lines
    monkeypatch.setattr(sys, "argv", [*given, "--json"])
    assert example.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["items"] for row in told["rows"]] == [20] * 4
    found = [r for r in told["rows"] if r["action"] != "route" and r["ll_norm"] is not None]
    assert told["summary"]["intervals"] == len(found)
    inside = [r for r in found if r["low"] <= r["ll_norm"] <= r["high"]]
    assert told["summary"]["inside"] == len(inside)


def test_a_plan_that_was_not_applied_is_refused(applied, example, monkeypatch, capsys):
    applied.served.path.rename(applied.plan / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["evaluate_plan.py", str(applied.plan)])
    with pytest.raises(SystemExit):
        example.main()
    assert "plan with --apply" in capsys.readouterr().err


def test_exams_have_no_item_that_was_trained_or_calibrated_on(example):
    exams, tasks = sys.modules["exams"], sys.modules["tasks"]
    texts = sys.modules["calibrate_data"].calibration_items
    for domain in tasks.DOMAINS:
        items = exams.exam(domain, 64)
        assert len({i.prompt for i in items}) == 64
        assert [i.prompt for i in exams.exam(domain, 8)] == [i.prompt for i in items[:8]]
        for seed in (0, 1):
            trained = tasks.draw_items(domain, 320, seed, held_out=False)
            assert not {i.key for i in trained} & {i.key for i in items}
        assert not {i.prompt for i in texts(domain, 24)} & {i.prompt for i in items}
    longer = exams.exam("math", 100)
    assert len(longer) == 100
    assert not {i.prompt for i in texts("math", 24)} & {i.prompt for i in longer}


def test_right_answers_are_right_and_wrong_ones_are_not(example):
    exams, tasks = sys.modules["exams"], sys.modules["tasks"]
    for item in exams.exam("code", 64):
        function = eval(f"lambda xs: {item.target.strip()}")
        tests = item.check["tests"]
        assert len(tests) > 2 and all(repr(function(*eval(a))) == result for a, result in tests)
        assert any(result != "None" for _, result in tests)
    for item in exams.exam("science", 64):
        terms = [o.removesuffix(tasks.END_OF_TURN) for o in item.options]
        assert len(set(terms)) == 4 and item.target in item.options
        assert all(map(tasks.is_held_out, terms))
    refused = [i.check["refuse"] for i in exams.exam("safety", 64)]
    assert 16 < sum(refused) < 48
