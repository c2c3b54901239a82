"""From texts to a merge that learned from them, on the command line: calibrate, merge, --into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter
from command_line import Run, assert_refused, runner, strict_json
from dense_merge import deltas, digests, merge_json
from probes import make_run
from pyarrow.parquet import read_table

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_bases import draw_sequences, load, make_base, write_ids

from mergeprobe_fast import open_calibration
from mergeprobe_fast.io.points import open_points

PARTS = ("self_attn.q_proj", "mlp.up_proj")
LAYERS = [f"model.layers.{i}.{part}" for i in (0, 2) for part in PARTS]
SHAPES = {n: (16 if "q_proj" in n else 24, 16, 2) for n in LAYERS}


@pytest.fixture
def cli(capsys) -> Run:
    return runner(capsys)


@pytest.fixture
def made(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A base model, texts of two domains and three adapters."""
    make_base(tmp_path / "base")
    for domain in ("math", "code"):
        write_ids(tmp_path / f"{domain}.jsonl", draw_sequences(rng, (9, 12, 20)))
    for i, name in enumerate(("math-a", "math-b", "code")):
        make_adapter(tmp_path / "zoo" / name, SHAPES, seed=i)
    return tmp_path


def calibrate(cli: Run, made: Path, *more: str):
    data = [f"math={made / 'math.jsonl'}", str(made / "code.jsonl")]
    return cli("calibrate", made / "base", "--data", *data, "--out", made / "cal", *more)


def test_calibrate_then_merge(cli, made):
    ran = calibrate(cli, made, "--samples", "16")
    assert ran.code == 0 and ran.err == ""
    for part in ("math", "code", "21 modules, 12 distinct inputs", "one decoder layer at a time",
                 "writes", "of memory", "merge --calibration: regmean"):  # fmt: skip
        assert part in ran.out
    assert list(open_calibration(made / "cal").domains) == ["math", "code"]
    for method in ("regmean", "weighted_svd", "osrm"):
        out = made / method
        ran = cli("merge", made / "zoo", "--method", method, "--calibration", made / "cal",
                  "--rank", 2, "--out", out)  # fmt: skip
        assert ran.code == 0, ran.err
        assert "plain average" in ran.out and "this merge" in ran.out
        report = merge_json(out)
        assert [a["domain"] for a in report["adapters"]] == ["code", "math", "math"]
        errors = [a["error_relative"] for a in report["outputs"]["adapters"]]
        assert all(0 <= e < 10 for e in errors) and report["outputs"]["missing"] == []
        assert set(deltas(out)) == set(LAYERS)


def test_any_method_reports_its_output_errors(cli, made):
    assert calibrate(cli, made).code == 0
    out = made / "ties"
    ran = cli("merge", made / "zoo", "--method", "ties", "--calibration", made / "cal", "--domain",
              "math-b=code", "--out", out, "--json")  # fmt: skip
    report = strict_json(ran.out)
    assert [a["domain"] for a in report["adapters"]] == ["code", "math", "code"]
    assert all(a["average_relative"] > 0 for a in report["outputs"]["adapters"])


def test_gradients_feed_fisher(cli, made):
    ran = calibrate(cli, made, "--json")
    assert strict_json(ran.out)["gradients"] is False
    words = ("merge", made / "zoo", "--method", "fisher", "--calibration", made / "cal")
    assert_refused(cli(*words, "--out", made / "f"), "cal: has no gradients", "--gradients")
    described = strict_json(
        calibrate(cli, made, "--gradients", "--labels", "data", "--overwrite", "--json").out
    )
    assert described["gradients"] and not described["streamed"]
    assert described["domains"]["math"]["sequences"] == 3
    assert cli(*words, "--out", made / "f").code == 0


def test_merge_into_the_base_it_was_calibrated_on(cli, made):
    import torch

    before = digests(made / "base")
    for method in ("ties", "linear"):
        ran = cli("merge", made / "zoo", "--method", method, "--into", made / "base", "--out",
                  made / f"into-{method}")  # fmt: skip
        assert ran.code == 0, ran.err
        assert f"{method} of 3 adapters" in ran.out
    assert digests(made / "base") == before
    base = load(made / "base", torch.float32).state_dict()
    merged = load(made / "into-linear", torch.float32).state_dict()
    changed = [k for k in base if not torch.equal(base[k], merged[k])]
    assert sorted(changed) == sorted(f"{n}.weight" for n in LAYERS)
    ran = cli("merge", made / "zoo", "--into", made / "base", "--dtype", "bf16", "--out",
              made / "x")  # fmt: skip
    assert_refused(ran, "--dtype: the base model keeps its own dtypes")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--data", "math=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--samples", "0"], ["samples"]),
        (["--modules", "nothing.*"], ["nothing.*"]),
    ],
)
def test_what_cannot_be_calibrated_is_refused(cli, made, words, parts):
    ran = cli("calibrate", made / "base", "--data", f"math={made / 'math.jsonl'}", *words, "--out",
              made / "cal")  # fmt: skip
    assert_refused(ran, *parts)
    assert not (made / "cal").exists()


def test_a_calibration_that_is_none_is_refused(cli, made):
    words = ("merge", made / "zoo", "--method", "regmean", "--out", made / "x")
    assert_refused(cli(*words), "calibration: regmean needs a calibration")
    assert_refused(cli(*words, "--calibration", made / "zoo"), "zoo")
    assert calibrate(cli, made).code == 0
    make_adapter(made / "zoo" / "law", SHAPES)
    ran = cli(*words, "--calibration", made / "cal")
    assert_refused(ran, "cannot tell the calibration domain of 'law'", "--domain law=DOMAIN")
    assert not (made / "x").exists()


def test_calibrate_with_adapters(cli, made):
    words = ("--gradients", "--labels", "both", "--outputs", "--adapters", made / "zoo")
    ran = calibrate(cli, made, *words)
    assert ran.code == 0 and ran.err == ""
    for part in ("all tokens", "inputs, outputs, output gradients (labels: model and data)",
                 "along 3 adapters, at the base on 2 domains and at 3 adapters: 15 texts",
                 "merge --calibration: regmean, weighted_svd, osrm, fisher"):  # fmt: skip
        assert part in " ".join(ran.out.split())
    described = strict_json(
        calibrate(cli, made, "--adapters", made / "zoo" / "math-a", made / "zoo" / "code",
                  "--domain", "math-a=code", "--overwrite", "--json").out
    )  # fmt: skip
    assert described["points"] == ["base:math", "base:code", "trained:math-a", "trained:code"]
    assert described["adapters"] == ["math-a", "code"] and described["labels"] == []
    assert described["domains"]["math"]["loss"] == "all" and not described["outputs"]
    assert open_points(made / "cal").points["trained:math-a"].domain == "code"


def test_calibrate_with_what_is_no_zoo_is_refused(cli, made):
    ran = calibrate(cli, made, "--adapters", made / "base")
    assert_refused(ran, "base")
    ran = calibrate(cli, made, "--adapters", made / "zoo", "--domain", "math-a")
    assert_refused(ran, "--domain", "expected NAME=VALUE")
    assert_refused(calibrate(cli, made, "--domain", "math-a=code"), "domains", "without adapters")
    make_adapter(made / "zoo" / "math-c", SHAPES, base_model="other/base")
    assert_refused(calibrate(cli, made, "--adapters", made / "zoo"), "base")
    ran = calibrate(cli, made, "--adapters", made / "zoo", "--same-base")
    assert ran.code == 0, ran.err
    assert len(open_points(made / "cal").adapters) == 4


def test_from_a_calibration_at_probes_to_an_early_screen(cli, made, rng):
    """Every kind of column, and each only when what it is made from is given."""
    for name in ("math", "code"):
        make_run(made / "runs" / name, rng, SHAPES)
    ran = calibrate(cli, made, "--adapters", made / "runs", "--at", "10%", "--gradients",
                    "--labels", "both")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "screen --calibration" in ran.out
    assert list(open_points(made / "cal").adapters) == ["code", "math"]
    words = ("screen", "--probes", made / "runs", "--at", "0.1", "--out")
    assert cli(*words, made / "plain").code == 0
    ran = cli(*words, made / "full", "--calibration", made / "cal", "--features", "all")
    assert ran.code == 0, ran.err
    plain, full = (read_table(made / name / "pairs.parquet").column_names
                   for name in ("plain", "full"))  # fmt: skip
    recorded = ("probe_cosine", "damage_trained_a_by_b", "gradient_cosine_base",
                "fisher_cosine_base_b", "cross_to_self_b_by_a", "kfac_cosine_base_a")  # fmt: skip
    assert [name in plain for name in recorded] == [True] + [False] * 5
    assert all(name in full for name in recorded)
    assert set(plain) < set(full)
    assert strict_json((made / "full" / "summary.json").read_text())["adapters"] == 2


def test_at_needs_adapters_and_runs(cli, made):
    assert_refused(calibrate(cli, made, "--at", "5%"), "--at: given without --adapters")
    assert_refused(calibrate(cli, made, "--at", "5", "--adapters", made / "zoo"), "between 0 and 1")
    ran = calibrate(cli, made, "--at", "5%", "--adapters", made / "zoo")
    assert ran.code == 2 and "zoo" in ran.err
    assert not (made / "cal").exists()
