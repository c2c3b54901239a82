"""Going on with a run of MERGE-PEFT: what is there is what the tier asks for, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from tiny_tier import make_adapter_plan, make_base_folder, make_tier  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.outcome.journal import JOURNAL_NAME, read_journal  # noqa: E402
from mergeprobe_fast.merge_peft.runs import exams as exams_module  # noqa: E402
from mergeprobe_fast.merge_peft.runs.exams import check_exams  # noqa: E402
from mergeprobe_fast.merge_peft.runs.run import look, run  # noqa: E402
from mergeprobe_fast.merge_peft.runs.units import STAGES  # noqa: E402
from mergeprobe_fast.merge_peft.stages import combine, routers  # noqa: E402
from mergeprobe_fast.merge_peft.tasks.item import Item  # noqa: E402
from mergeprobe_fast.merge_peft.tiers.plan import Exam, Operator, Tier  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run that stopped after its trainings."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "trained"
    run(make_tier("sum", gradients=False), out, base=base, jobs=1, until="train")
    return out


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out))


def error(call: Callable[[], Any]) -> mpf.InputError:
    with pytest.raises(mpf.InputError) as caught:
        call()
    return caught.value


def changed(tier: Tier, name: str, items: int | None = None, **recipe: Any) -> Tier:
    """The tier with another training of one adapter; of its exam, too, where that is asked for."""
    plan, exams = tier.adapters[name], dict(tier.exams)
    adapters = dict(tier.adapters)
    if "tasks" in recipe:
        exams[plan.exam] = replace(exams[plan.exam], tasks=recipe["tasks"])
        for other in [a for a in adapters.values() if a.exam == plan.exam]:
            adapters[other.name] = replace(
                other, recipe=replace(other.recipe, tasks=recipe["tasks"])
            )
    again = adapters[name]
    adapters[name] = replace(
        again, items=items or again.items, recipe=replace(again.recipe, **recipe)
    )
    return replace(tier, exams=exams, adapters=adapters)


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("math-a", {"steps": 7}, "recipe"), ("life-a", {"lr": 1e-2}, "recipe"),
        ("math-a", {"items": 13}, "items"), ("math-a", {"tasks": ("math.percent",)}, "recipe"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_training_is_refused_before_anything_is_measured(
    tmp_path, base, trained, name, change, key
):
    out = copied(trained, tmp_path / "run")
    other = changed(make_tier("sum", gradients=False), name, **change)
    caught = error(lambda: run(other, out, base=base, jobs=1, until="singles"))
    assert caught.path == str(out / "adapters" / name / "training.json") and caught.key == key
    assert not read_journal(out).scores


def test_an_untouched_adapter_stays_when_the_tier_changes(tmp_path, base, trained):
    out = copied(trained, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    found = run(make_tier("sum", "mean", gradients=False), out, base=base, jobs=1, until="singles")
    assert found.plan.count("train") == 0 and read_journal(out).scores
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}


def test_items_of_other_words_are_refused(tmp_path, base, trained, monkeypatch):
    out, plain = copied(trained, tmp_path / "run"), Exam.items

    def reworded(exam: Exam, split: str, count: int, seed: int) -> list[Item]:
        found = plain(exam, split, count, seed)
        if split != "test":
            return found
        return [replace(item, prompt=f"Please. {item.prompt}") for item in found]

    monkeypatch.setattr(Exam, "items", reworded)
    tier = make_tier("sum", gradients=False)
    caught = error(lambda: run(tier, out, base=base, jobs=1, until="train"))
    assert caught.key == "math" and "items have changed" in caught.reason


def test_a_journal_of_the_first_runs_goes_on(tmp_path, base, trained):
    """It has no digest of items and no kernels; other items, by their keys, are refused in it."""
    out, tier = copied(trained, tmp_path / "run"), make_tier("sum", gradients=False)
    lines = [json.loads(line) for line in (out / JOURNAL_NAME).read_bytes().splitlines()]
    for line in lines:
        line.pop("kernels", None)
        line.pop("sha256", None)
    old = "".join(json.dumps(line) + "\n" for line in lines)
    (out / JOURNAL_NAME).write_text(old)
    for _ in range(2):
        found = run(tier, out, base=base, jobs=1, until="train")
        assert found.plan.count("train") == 0
    text = (out / JOURNAL_NAME).read_text()
    assert text.startswith(old) and text.count("sha256") == len(tier.exams)
    lines[1]["item_keys"][0] += "0"
    (out / JOURNAL_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    caught = error(lambda: run(tier, out, base=base, jobs=1, until="train"))
    assert caught.key == lines[1]["exam"]


def test_a_processor_of_other_kernels_is_refused(tmp_path, base, trained, monkeypatch):
    out, tier = copied(trained, tmp_path / "run"), make_tier("sum", gradients=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    caught = error(lambda: run(tier, out, base=base, jobs=1, until="train"))
    assert caught.key == "kernels" and "ANOTHER" in caught.reason


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run that stopped after its calibrations: 4 with gradients, 6 with points."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "calibrated"
    run(make_tier("fisher"), out, base=base, jobs=1, until="calibrate")
    return out


def test_a_calibration_that_lacks_what_is_asked_for_is_refused(tmp_path, base, calibrated):
    tier = make_tier("fisher")
    out = copied(calibrated, tmp_path / "gradients")
    shutil.rmtree(out / "calibration")
    run(make_tier("regmean-4", gradients=False), out, base=base, jobs=1, until="calibrate")
    caught = error(lambda: run(tier, out, base=base, jobs=1, until="calibrate"))
    assert (caught.path, caught.key) == (str(out / "calibration" / "4"), "gradients")

    out = copied(calibrated, tmp_path / "points")
    more = tier.adapters | {"math-c": make_adapter_plan("math-c", "math", init_seed=5)}
    more = replace(tier, adapters=more)
    caught = error(lambda: run(more, out, base=base, jobs=1, until="calibrate"))
    assert (caught.path, caught.key) == (str(out / "calibration" / "6"), "math-c")
    assert "remove it to record it again" in caught.reason
    shutil.rmtree(out / "calibration" / "6")
    assert run(more, out, base=base, jobs=1, until="calibrate").plan.count("calibrate") == 1

    out = copied(calibrated, tmp_path / "none")
    for path in (out / "calibration" / "6").glob("points.*"):
        path.unlink()
    caught = error(lambda: run(tier, out, base=base, jobs=1, until="calibrate"))
    assert (caught.path, caught.key) == (str(out / "calibration" / "6"), "math-a")


def test_a_calibration_of_other_texts_is_refused(tmp_path, base, calibrated, monkeypatch):
    """The texts themselves are written anew, so that only the calibration knows better."""
    out, plain = copied(calibrated, tmp_path / "run"), Exam.items

    def reworded(exam: Exam, split: str, count: int, seed: int) -> list[Item]:
        found = plain(exam, split, count, seed)
        if split != "calibration" or exam.name != "case":
            return found
        return [replace(item, prompt=f"Please. {item.prompt}") for item in found]

    monkeypatch.setattr(Exam, "items", reworded)
    shutil.rmtree(out / "texts")
    caught = error(lambda: run(make_tier("fisher"), out, base=base, jobs=1, until="calibrate"))
    assert (caught.path, caught.key) == (str(out / "calibration" / "4"), "case")
    assert "other texts" in caught.reason


def test_a_folder_of_another_run_is_not_looked_at(tmp_path, base, trained):
    out, tier = copied(trained, tmp_path / "run"), make_tier("sum", gradients=False)
    more = make_tier("sum", "mean", gradients=False)
    assert look(tier, out).count("train") == look(more, out).count("train") == 0
    run(tier, out, base=base, jobs=1, until="singles")
    for call, key in (
        (lambda: look(make_tier("sum", gradients=False, seed=1), out), "seed"),
        (lambda: look(replace(tier, name="other"), out), "tier"),
        (lambda: look(more, out), "digest"),
        (lambda: look(tier, out, only=[*tier.merges][:1]), "only"),
    ):
        caught = error(call)
        assert (caught.path, caught.key) == (str(out / JOURNAL_NAME), key)
    assert look(tier, out).count("singles") == 0


def test_only_leftovers_of_ours_are_removed(tmp_path, base, trained):
    out = copied(trained, tmp_path / "run")
    ours = [out / f".{name}.tmp-{'0' * 16}" for name in ("labels.parquet", JOURNAL_NAME)]
    others = [out / f".notes.txt.tmp-{'0' * 16}", out / ".labels.parquet.mine"]
    for path in (*ours, *others):
        path.write_text("")
    run(make_tier("sum", gradients=False), out, base=base, jobs=1, until="train")
    assert not any(path.exists() for path in ours) and all(path.exists() for path in others)


def test_a_merge_whose_algebra_fails_is_noted_and_the_others_go_on(
    tmp_path, base, trained, monkeypatch
):
    out, plain = copied(trained, tmp_path / "run"), combine.merge
    tier = replace(make_tier("sum", "mean", gradients=False), crossed=())

    def failing(zoo: Any, method: str, weights: list[float], *rest: Any, **named: Any) -> Any:
        if weights[0] == 0.5:
            raise np.linalg.LinAlgError("SVD did not converge")
        return plain(zoo, method, weights, *rest, **named)

    monkeypatch.setattr(combine, "merge", failing)
    found = run(tier, out, base=base, jobs=1, until="merges")
    assert {*found.failed} == {key for key in tier.merges if key.startswith("mean")}
    assert {*found.failed.values()} == {"LinAlgError: SVD did not converge"}
    assert {*read_journal(out).merged} == {key for key in tier.merges if key.startswith("sum")}
    monkeypatch.setattr(combine, "merge", plain)
    again = run(tier, out, base=base, jobs=1, until="merges")
    assert again.plan.count("merges") == len(found.failed) and not again.failed
    assert sum(look(tier, out).count(stage) for stage in STAGES) == 0


@pytest.mark.parametrize("of", ["routers", "osrm"])
def test_what_routers_and_osrm_read_is_no_test_item(monkeypatch, of):
    """Each draws items of the split train that no adapter is trained on."""
    tier, plain, named = make_tier("sum", gradients=False), Exam.items, exams_module.osrm_items
    check_exams(tier)
    leaked = tier.exams["math"].items("test", tier.test_items, tier.seed)

    def drawn(exam: Exam, split: str, count: int, seed: int) -> list[Item]:
        wanted = exam.name, split, count == tier.calibration_items
        return leaked if wanted == ("math", "train", True) else plain(exam, split, count, seed)

    if of == "routers":
        assert "math" in routers.exams_of(tier)
        monkeypatch.setattr(Exam, "items", drawn)
    else:
        monkeypatch.setattr(
            exams_module, "osrm_items",
            lambda plan: [*named(plan), *(leaked if named(plan) else ())],
        )  # fmt: skip
    assert error(lambda: check_exams(tier)).key == "train and test"


def test_an_operator_gets_no_more_calibration_texts_than_there_are():
    tier = make_tier("regmean-4")
    assert replace(tier, calibration_items=4).calibration_items == 4
    caught = error(lambda: replace(tier, calibration_items=3))
    assert caught.key == "regmean-4" and "4 texts of 3" in caught.reason
    unused = {"regmean-7": Operator("regmean-7", "regmean", calibration=7)}
    assert error(lambda: replace(tier, operators=unused, merges={})).key == "regmean-7"
