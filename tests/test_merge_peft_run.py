"""Runs of MERGE-PEFT: what is measured, and that a stopped one goes on as if nothing had been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import delta_of
from tolerances import bound

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from tiny_items import token_log_likelihoods, wide_copy  # noqa: E402
from tiny_tier import EXAMS, make_base_folder, make_tier  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.model.base import load_base  # noqa: E402
from mergeprobe_fast.merge_peft.outcome.journal import JOURNAL_NAME, Journal, read_journal  # noqa: E402
from mergeprobe_fast.merge_peft.outcome.labels import read_labels  # noqa: E402
from mergeprobe_fast.merge_peft.runs import work  # noqa: E402
from mergeprobe_fast.merge_peft.runs.run import look, run  # noqa: E402
from mergeprobe_fast.merge_peft.runs.units import FEATURES, STAGES  # noqa: E402
from mergeprobe_fast.merge_peft.stages.evaluate import Evaluation  # noqa: E402
from mergeprobe_fast.merge_peft.tiers.plan import Exam, MergePlan, single_key  # noqa: E402

TIMES = ("seconds", "seconds_per_prompt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A whole run in one process."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "whole"
    run(make_tier(), out, base=base, jobs=1)
    return out


def content(journal: Journal) -> dict[str, Any]:
    """All that a journal says but how long things took."""

    def timeless(lines: dict[Any, Any]) -> dict[Any, Any]:
        return {key: {k: v for k, v in line.items() if k not in TIMES}
                for key, line in lines.items()}  # fmt: skip

    kinds = ("exams", "trained", "merged", "failed", "scores", "routed")
    return {"run": journal.run} | {kind: timeless(getattr(journal, kind)) for kind in kinds}


def assert_same(out: Path, other: Path) -> None:
    one, two = content(read_journal(out)), content(read_journal(other))
    for kind in one:
        assert one[kind] == two[kind], kind
    for rows in zip(read_labels(out / "labels.parquet"), read_labels(other / "labels.parquet"),
                    strict=True):  # fmt: skip
        one, two = ({k: v for k, v in row.items() if k not in ("merge_seconds", "command", *TIMES)}
                    for row in rows)  # fmt: skip
        assert one == two


def error(call: Callable[[], Any]) -> mpf.InputError:
    with pytest.raises(mpf.InputError) as caught:
        call()
    return caught.value


def copy_trained(whole: Path, out: Path) -> Path:
    """A folder with the adapters of a whole run, so that only the rest is to be done."""
    for part in ("adapters", "probes"):
        shutil.copytree(whole / part, out / part)
    return out


def test_a_run_leaves_what_it_says(whole):
    tier = make_tier()
    journal = read_journal(whole)
    assert {*journal.trained} == {*tier.adapters} and journal.failed == {}
    assert {*journal.merged} == {*tier.merges}
    exam_of = {name: adapter.exam for name, adapter in tier.adapters.items()}
    expected = {("base", exam) for exam in EXAMS}
    expected |= {(single_key(name), exam) for name, exam in exam_of.items()}
    expected |= {(key, exam_of[name]) for key, m in tier.merges.items() for name in m.members}
    assert expected <= {*journal.scores}
    assert {key for key, _ in {*journal.scores} - expected} <= {
        single_key("math-a"), single_key("case-a")
    }  # fmt: skip
    assert journal.routed
    rows = read_labels(whole / "labels.parquet")
    merged = [row for row in rows if row["study"] != "routing"]
    assert {(r["operator"], tuple(r["members"]), r["member"]) for r in merged} == {
        (m.operator, m.members, name) for m in tier.merges.values() for name in m.members
    }  # fmt: skip
    for name in ("features.parquet", "merge-features.parquet", "summary.json", "report.html"):
        assert (whole / name).stat().st_size > 0
    assert (whole / "calibration" / "6" / "points.json").is_file()
    assert not list(whole.rglob(".*"))


def test_scores_are_those_of_the_dense_sums(whole, base):
    """Weights one and mean: W + sum_j w_j B_j A_j in float64, every text of its own."""
    tier, journal, loaded = make_tier(), read_journal(whole), load_base(base)
    for operator, weight in (("sum", 1.0), ("mean", 0.5)):
        line = journal.merged[f"{operator}(math-a+case-a)"]
        assert line["weights"] == [weight, weight] and line["rank"] == 4
        deltas: dict[str, np.ndarray] = {}
        for name in line["members"]:
            (adapter,) = mpf.open_zoo([whole / "adapters" / name])
            for path, module in adapter.modules.items():
                deltas[path] = deltas.get(path, 0) + weight * delta_of(module)
        model = wide_copy(loaded, deltas)
        for exam in ("math", "case"):
            items = tier.exams[exam].items("test", tier.test_items, tier.seed)
            truth = [token_log_likelihoods(model, loaded, i.prompt, i.target)[0].mean()
                     for i in items]  # fmt: skip
            found = journal.scores[line["key"], exam]["loglik"]
            assert np.abs(np.array(found) - truth).max() <= bound("likelihood")
            single = journal.scores[single_key(f"{exam}-a"), exam]["loglik"]
            assert np.abs(np.array(single) - truth).max() > 10 * bound("likelihood")
        # case-a is in layer 2 alone: there the result has rank 4, in layer 1 rank 2.
        ranks = {path: 4 if "layers.2" in path else 2 for path in deltas}
        assert line["parameters"] == sum(ranks[p] * sum(d.shape) for p, d in deltas.items())


def test_a_swapped_calibration_is_that_of_the_other_member(whole, base):
    tier, journal, loaded = make_tier(), read_journal(whole), load_base(base)
    members = ("math-a", "life-a")
    paths = [whole / "adapters" / name for name in members]
    items = tier.exams["life"].items("test", tier.test_items, tier.seed)
    for operator, domains in (("regmean-4", ["math", "life"]), ("swapped", ["life", "math"])):
        merged = mpf.merge(
            paths, "regmean", [1.0, 1.0], 2, calibration=whole / "calibration" / "4",
            domains=domains, threads=1, dtype="F32",
        )  # fmt: skip
        found = Evaluation(items, loaded, 1, threads=1).run(merged).loglik.tolist()
        assert found == journal.scores[f"{operator}({'+'.join(members)})", "life"]["loglik"]
    one, two = (journal.scores[f"{o}(math-a+life-a)", "life"] for o in ("regmean-4", "swapped"))
    assert one["loglik"] != two["loglik"]


def test_found_weights_beat_any_others(whole):
    """reweighted has the best mean, minimax the best worst case, of 1 - |M - W_i|^2 / |W_i|^2."""
    journal, rng = read_journal(whole), np.random.default_rng(0)
    members = ("math-a", "life-a")
    for operator, best in (("reweighted", "mean"), ("minimax", "worst")):
        line = journal.merged[f"{operator}(math-a+life-a)"]
        tried = [line["weights"], *(line["weights"] + rng.normal(0, 0.2, (30, 2)))]
        table = mpf.set_features(
            [whole / "adapters" / name for name in members], [members] * len(tried), tried,
            features=f"retention_{best}", calibration=whole / "calibration" / "4",
            domains=["math", "life"],
        )  # fmt: skip
        found = table[f"retention_{best}"]
        assert found[0] >= found[1:].max() - 1e-6


def test_a_run_that_is_interrupted_again_and_again_goes_on(tmp_path, rng, whole, base):
    tier, out = make_tier(), tmp_path / "run"
    stops = 0
    while True:
        left = int(rng.integers(5, 60)) * (1 + stops // 2)  # a calibration is made as a whole

        def stop(stage: str, what: str, seconds: float) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        try:
            result = run(tier, out, base=base, jobs=1, progress=stop)
            break
        except KeyboardInterrupt:
            stops += 1
            path = out / JOURNAL_NAME
            torn = path.read_bytes()[: -int(rng.integers(1, 30))]
            path.write_bytes(torn if torn.count(b"\n") > 1 else path.read_bytes())
    assert stops and result.failed == {}
    assert_same(out, whole)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    again = run(tier, out, base=base, jobs=1)
    assert all(again.plan.count(stage) == 0 for stage in STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}


def test_two_processes_that_are_killed_leave_a_run_that_goes_on(tmp_path, whole, base):
    """SIGKILL of the parent in the middle; its workers go, too, and the rest is the same."""
    out, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from tiny_tier import make_tier\nfrom mergeprobe_fast.merge_peft.runs.run import run\n"
        "if __name__ == '__main__':\n"
        f"    run(make_tier(), {str(out)!r}, base={str(base)!r}, jobs=2)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], start_new_session=True) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            path = out / JOURNAL_NAME
            if path.is_file() and path.read_bytes().count(b'"scores"') > 15:
                break
            time.sleep(0.05)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while _alive_in(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive_in(process.pid)
    found = content(read_journal(out))
    full = content(read_journal(whole))
    assert found["scores"].items() <= full["scores"].items() and found["trained"]
    run(make_tier(), out, base=base, jobs=1)
    assert_same(out, whole)


def _alive_in(session: int) -> list[int]:
    """Processes of a session that are not dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_part_of_a_tier_has_the_rows_of_the_whole(tmp_path, whole, base):
    """Its calibration is of fewer exams, it has fewer adapters, and nothing else differs."""
    keys = ["regmean-4(math-a+case-a)", "fisher(math-a+case-a)"]
    run(make_tier(), tmp_path / "part", base=base, jobs=1, only=keys, until="merges")
    part, full = read_journal(tmp_path / "part"), read_journal(whole)
    assert part.run["only"] == sorted(keys) and {*part.trained} == {"math-a", "case-a"}
    for name in part.trained:
        assert part.trained[name]["loss"] == full.trained[name]["loss"]
    assert "life" not in mpf.open_calibration(tmp_path / "part" / "calibration" / "4").domains
    for (key, exam), line in part.scores.items():
        gap = np.abs(np.array(line["loglik"]) - full.scores[key, exam]["loglik"]).max()
        assert gap <= bound("likelihood"), (key, exam)
    caught = error(lambda: run(make_tier(), tmp_path / "part", base=base))
    assert caught.key == "only"


def test_what_an_operator_refuses_is_noted_and_tried_again(tmp_path, whole, base):
    tier = make_tier("sum", "swapped", gradients=False)
    bad = [MergePlan("swapped", ("math-a", "math-b")), MergePlan("sum", ("math-a", "math-b"))]
    tier = replace(tier, merges={m.key: m for m in bad}, crossed=())
    out = copy_trained(whole, tmp_path / "run")
    for _ in range(2):
        result = run(tier, out, base=base, jobs=1)
        assert {*result.failed} == {bad[0].key} and "nothing to swap" in result.failed[bad[0].key]
        assert result.plan.count("merges") >= 1
    journal = read_journal(out)
    assert {*journal.merged} == {bad[1].key} and journal.trained["math-a"]["seconds"] is None
    assert {row["operator"] for row in read_labels(out / "labels.parquet")} == {"sum"}


def test_evaluations_that_had_to_go_are_made_again_and_say_the_same(
    tmp_path, whole, base, monkeypatch
):
    monkeypatch.setattr(work, "_EVALUATIONS_NBYTES", 1)
    tier = make_tier("sum", gradients=False)
    out = copy_trained(whole, tmp_path / "run")
    run(tier, out, base=base, jobs=1, until="merges")
    found, full = content(read_journal(out)), content(read_journal(whole))
    assert found["scores"].items() <= full["scores"].items()


def test_a_leak_is_found_before_anything_is_trained(tmp_path, base, monkeypatch):
    plain = Exam.items

    def leaking(exam: Exam, split: str, count: int, seed: int) -> list[Any]:
        return plain(exam, "train" if split == "test" else split, count, seed)

    monkeypatch.setattr(Exam, "items", leaking)
    caught = error(lambda: run(make_tier(), tmp_path / "run", base=base, jobs=1))
    assert caught.key == "train and test" and not (tmp_path / "run").exists()


def test_bad_arguments_and_other_folders_are_refused(tmp_path, whole, base):
    tier = make_tier()
    for call, key in (
        (lambda: run(tier, tmp_path, base=base, until="report"), "until"),
        (lambda: run(tier, tmp_path, base=base, only=["sum(a+b)"]), "sum(a+b)"),
        (lambda: run(make_tier(seed=1), whole, base=base), "seed"),
        (lambda: run(make_tier("sum"), whole, base=base), "digest"),
    ):
        assert error(call).key == key
    with pytest.raises(mpf.InputError, match="threads must be"):
        run(tier, tmp_path, base=base, jobs=0)
    out = copy_trained(whole, tmp_path / "texts")
    (out / "texts").mkdir()
    (out / "texts" / "math.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    caught = error(lambda: run(make_tier("regmean-4"), out, base=base, jobs=1, until="calibrate"))
    assert caught.path == str(out / "texts" / "math.jsonl")


def test_the_plan_says_what_is_left_and_progress_adds_up_to_it(tmp_path, whole, base):
    tier = make_tier("sum", "regmean-4")
    out = copy_trained(whole, tmp_path / "run")
    before = look(tier, out)
    assert before.count("train") == 4 and before.count("merges") == len(tier.merges)
    assert not (out / JOURNAL_NAME).exists()
    plans, told = [], []
    run(tier, out, base=base, jobs=1, until="merges", announce=plans.append,
        progress=lambda stage, what, seconds: told.append((stage, seconds)))  # fmt: skip
    for stage in STAGES:
        done = sum(seconds for name, seconds in told if name == stage)
        assert done == pytest.approx(plans[0].seconds(stage))
    left = look(tier, out)
    assert sum(left.seconds(stage) for stage in STAGES) == 0
    assert left.count(FEATURES) == len(tier.merges) and left.seconds() == left.seconds(FEATURES) > 0
    only = look(tier, tmp_path / "new", only=["sum(math-a+case-a)"])
    assert [only.count(stage) for stage in STAGES] == [2, 0, 4, 0, 0, 1]


def test_leftovers_of_a_killed_process_are_removed(tmp_path, whole, base):
    out = copy_trained(whole, tmp_path / "run")
    left = out / "adapters" / f".math-a.tmp-{'0' * 16}"
    left.mkdir()
    (left / "file").write_text("")
    (out / "adapters" / ".mine").write_text("")
    run(make_tier("sum"), out, base=base, jobs=1, until="train")
    assert not left.exists() and (out / "adapters" / ".mine").exists()


def test_a_worker_that_dies_is_named_and_the_run_goes_on_later(tmp_path, whole, base):
    import multiprocessing

    tier = make_tier("sum", gradients=False)
    out = copy_trained(whole, tmp_path / "run")

    def kill(stage: str, what: str, seconds: float) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(mpf.BackendError, match="ended with exit code -9"):
        run(tier, out, base=base, jobs=2, progress=kill)
    assert not multiprocessing.active_children()
    run(tier, out, base=base, jobs=1, until="merges")
    assert {*read_journal(out).merged} == {*tier.merges}
