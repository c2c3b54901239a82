"""What applying a plan writes: every delta against a dense sum, every file against its record."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import delta_of, make_adapter, make_zoo
from calibrations import make_calibration
from dense_merge import RAGGED, WIDE, exact_sums, seed_from
from planning_judges import HarmJudge
from single_files import make_file

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import open_adapter
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.router_file import load_router
from mergeprobe_fast.planning import Costs, Plan, make_plan
from mergeprobe_fast.planning.artefacts import CONTENTS, apply_plan
from mergeprobe_fast.planning.plan_types import Group
from mergeprobe_fast.planning.result import PlannedAdapter
from mergeprobe_fast.planning.served import read_served, sha256_of
from mergeprobe_fast.planning.unchanged import fingerprints
from mergeprobe_fast.predict.predictor import Facts
from mergeprobe_fast.predict.recipe import Recipe

SIZES = {name: size[:2] for name, size in WIDE.items()}


def plan_of(*groups):
    return SimpleNamespace(groups=groups)


def stays(name):
    return Group(name, (name,), "route", retention=(1.0,), low=(1.0,), high=(1.0,))


def merges(name, *members, method="linear", weights=None, action="merge", **arguments):
    kept = tuple(0.9 - 0.01 * i for i in range(len(members)))
    return Group(name, members, action, method, weights, arguments, kept, kept, (None,) * len(kept))


def zoo_in(folder, rng, recipes=None):
    recipes = recipes or {name: {"modules": WIDE, "rank": 3} for name in "abcd"}
    made = {
        name: make_adapter(folder / name, **{"seed": seed_from(rng), **recipe})
        for name, recipe in recipes.items()
    }
    return mpf.open_zoo([m.path for m in made.values()]), made


def everything_in(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_deltas(adapter, expected, relative=1e-6):
    """Every module is the dense one, to rounding of float32 factors; others are zero."""
    assert set(adapter.modules) == set(expected)
    for name, ref in adapter.modules.items():
        size = max(np.linalg.norm(expected[name]), 1e-30)
        assert np.linalg.norm(delta_of(ref) - expected[name]) < relative * size, name


def test_merges_are_dense_sums_and_the_others_are_copies_byte_for_byte(tmp_path, rng):
    zoo, made = zoo_in(tmp_path / "zoo", rng)
    weights = tuple(rng.uniform(0.5, 1.5, 2))
    plan = plan_of(merges("a+c", "c", "a", weights=weights), stays("b"), stays("d"))
    served = apply_plan(plan, zoo, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(CONTENTS)
    expected = exact_sums([made["c"], made["a"]], weights)
    merged = open_adapter(served.folder("a+c"))
    assert_deltas(merged, expected)
    with pytest.raises(AssertionError):  # the weights exchanged
        assert_deltas(merged, exact_sums([made["a"], made["c"]], weights))
    for name in "bd":
        assert everything_in(served.folder(name)) == everything_in(made[name].path)
    assert served.serves == {"a": "a+c", "c": "a+c", "b": "b", "d": "d"}
    assert served == read_served(tmp_path / "out")


def test_the_record_says_what_was_done_and_what_is_there(tmp_path, rng):
    zoo, made = zoo_in(tmp_path / "zoo", rng)
    plan = plan_of(merges("m", "a", "b", "c", method="svd", rank=4), stays("d"))
    served = apply_plan(plan, zoo, tmp_path / "out")
    merged, copied = served.residents
    assert (merged.action, merged.method, dict(merged.arguments)) == ("merge", "svd", {"rank": 4})
    assert [(m.name, m.weight, m.retention, m.low, m.high) for m in merged.members] == [
        ("a", None, 0.9, 0.9, None), ("b", None, 0.89, 0.89, None), ("c", None, 0.88, 0.88, None),
    ]  # fmt: skip
    (kept,) = copied.members
    assert (kept.weight, kept.retention, kept.path) == (1.0, 1.0, os.fspath(made["d"].path))
    assert copied.method is None and copied.truncation_error == copied.rounding_error == 0
    total, lost = 0.0, 0.0
    for delta in exact_sums([made[n] for n in "abc"], [1 / 3] * 3).values():
        sigma = np.linalg.svd(delta)[1]
        total, lost = total + (sigma**2).sum(), lost + (sigma[4:] ** 2).sum()
    assert merged.truncation_error == pytest.approx(np.sqrt(lost / total), rel=1e-5)
    for resident in served.residents:
        folder = served.folder(resident.name)
        assert dict(resident.sha256) == {f: sha256_of(folder / f) for f in os.listdir(folder)}
        assert resident.nbytes == sum(len(raw) for raw in everything_in(folder).values())
        opened = open_adapter(folder)
        assert resident.fingerprint == fingerprint(opened)
        assert resident.rank == max(m.rank for m in opened.modules.values())
    router = load_router(tmp_path / "out")
    assert dict(router.info.adapters) == {r.name: r.fingerprint for r in served.residents}


def test_where_vllm_would_read_another_scale_the_adapter_is_written_anew(tmp_path, rng):
    recipes = dict(zip("abc", RAGGED, strict=True)) | {
        "r": {"modules": WIDE, "rank": 4, "rslora": True, "alpha": 7},
    }
    zoo, made = zoo_in(tmp_path / "zoo", rng, recipes)
    served = apply_plan(plan_of(*map(stays, made)), zoo, tmp_path / "out")
    for resident in served.residents:
        adapter = open_adapter(served.folder(resident.name))
        assert_deltas(adapter, {n: m.delta for n, m in made[resident.name].modules.items()})
        config = adapter.config  # vllm/lora/peft_helper.py: one scale, no pattern
        scale = config["lora_alpha"] / (
            np.sqrt(config["r"]) if config["use_rslora"] else config["r"]
        )
        for m in adapter.modules.values():
            assert m.rank <= config["r"] and m.scale == pytest.approx(scale, rel=1e-12)
    anew = [r.name for r in served.residents if r.method is not None]
    assert anew == ["c"] and any("c was written anew" in note for note in served.notes)


def test_any_name_makes_a_folder_of_its_own(tmp_path, rng):
    names = ["math v2", "MATH V2", "数学 é", "a/b", "a-b", "..", "x" * 250, "x" * 251, "it's \"c\""]
    zoo, _ = zoo_in(tmp_path / "zoo", rng, {f"{i}": {"modules": WIDE} for i in range(9)})
    groups = [merges(n, f"{i}", weights=(1.0,)) for i, n in enumerate(names)]
    served = apply_plan(plan_of(*groups), zoo, tmp_path / "out folder")
    assert [r.name for r in served.residents] == names
    folders = [r.folder for r in served.residents]
    assert len({f.casefold() for f in folders}) == 9 and folders[0] == "adapters/math v2"
    assert read_served(tmp_path / "out folder") == served
    assert load_router(tmp_path / "out folder").adapters == tuple(names)
    assert all(served.folder(n).parent == tmp_path / "out folder/adapters" for n in names)


def test_a_group_of_one_may_be_merged_with_a_weight(tmp_path, rng):
    zoo, made = zoo_in(tmp_path / "zoo", rng, {"a": {"modules": WIDE}})
    served = apply_plan(plan_of(merges("half", "a", weights=(0.5,))), zoo, tmp_path / "out")
    assert_deltas(open_adapter(served.folder("half")), exact_sums([made["a"]], [0.5]))
    assert load_router(tmp_path / "out").choose({"head": np.ones((3, 40))}).adapter == "half"


def test_two_hundred_adapters(tmp_path, rng):
    sizes = {"q": (12, 10, 2), "v": (6, 10, 2)}
    made = make_zoo(tmp_path / "zoo", 200, modules=sizes, seed=seed_from(rng))
    zoo = mpf.open_zoo(tmp_path / "zoo")
    names = zoo.names
    groups = [merges(f"m{i}", *names[2 * i : 2 * i + 2]) for i in range(50)]
    done = []
    served = apply_plan(plan_of(*groups, *map(stays, names[100:])), zoo, tmp_path / "out",
                        progress=done.append)  # fmt: skip
    assert sum(done) == 151 and len(served.residents) == 150 and len(served.serves) == 200
    for i in (0, 17, 49):
        expected = exact_sums(made[2 * i : 2 * i + 2], [0.5, 0.5])
        assert_deltas(open_adapter(served.folder(f"m{i}")), expected)
    assert read_served(tmp_path / "out") == served
    assert load_router(tmp_path / "out").prototypes("q").shape == (150, 10)


def test_threads_change_no_byte(tmp_path, rng):
    zoo, _ = zoo_in(tmp_path / "zoo", rng)
    plan = plan_of(merges("m", "a", "b", "c", method="ties", density=0.5, rank=3), stays("d"))
    one, two = (
        (apply_plan(plan, zoo, tmp_path / f"{t}", threads=t), everything_in(tmp_path / f"{t}"))[1]
        for t in (1, 2)
    )
    assert one == two


def test_methods_that_learn_get_the_calibration_and_the_router_a_rule(tmp_path, rng):
    recipes = {name: {"modules": WIDE, "rank": 3} for name in ("math-a", "code-a", "law-a")}
    zoo, _ = zoo_in(tmp_path / "zoo", rng, recipes)
    apart = {d: 4 * rng.standard_normal(40) for d in ("math", "code", "law")}
    samples = {(d, n): apart[d][: size[1]] + rng.standard_normal((80, size[1]))
               for d in apart for n, size in SIZES.items()}  # fmt: skip
    made = make_calibration(tmp_path / "cal", SIZES, dict.fromkeys(apart, 80), rng,
                            samples=samples, sequences=20)  # fmt: skip
    plan = plan_of(merges("m", "law-a", "math-a", method="regmean", action="regmean"),
                   stays("code-a"))  # fmt: skip
    served = apply_plan(plan, zoo, tmp_path / "out", calibration=made.path)
    merged = mpf.merge([zoo[2].path, zoo[0].path], "regmean", calibration=made.path)
    merged.save(tmp_path / "alone")
    assert fingerprint(open_adapter(tmp_path / "alone")) == served.residents[0].fingerprint
    info = load_router(tmp_path / "out").info
    assert info.texts == 60 and info.accuracy["linear"] > 0.9
    assert dict(info.linear.domains) == {"math": "m", "code": "code-a", "law": "m"}
    other = {"math-a": "law", "law-a": "law", "code-a": "code"}
    apply_plan(plan, zoo, tmp_path / "two", calibration=made.path, domains=other)
    assert dict(load_router(tmp_path / "two").info.linear.domains) == {"law": "m", "code": "code-a"}


def test_a_rank_above_the_limit_is_named_and_can_be_cut(tmp_path, rng):
    big = {"modules": {"q": (620, 610, 300)}}
    zoo, made = zoo_in(tmp_path / "zoo", rng, {name: big for name in "ab"})
    plan = plan_of(merges("m", "a", "b"))
    served = apply_plan(plan, zoo, tmp_path / "out")
    assert served.residents[0].rank == 600 and served.vllm_command is None
    assert any("rank 600, and vLLM takes 512 at most" in note for note in served.notes)
    assert read_served(tmp_path / "out") == served
    cut = apply_plan(plan, zoo, tmp_path / "cut", max_rank=512)
    assert cut.residents[0].rank == 512 and "--max-lora-rank 512" in cut.vllm_command
    sigma = np.linalg.svd(exact_sums([made["a"], made["b"]], [0.5, 0.5])["q"])[1]
    expected = np.sqrt((sigma[512:] ** 2).sum() / (sigma**2).sum())
    assert cut.residents[0].truncation_error == pytest.approx(expected, rel=1e-4)
    # What was predicted was predicted of the whole merge.
    assert all(m.retention is m.low is m.high is None for m in cut.residents[0].members)
    assert served.residents[0].members[0].retention == 0.9
    assert cut.notes[0].startswith("m was cut to rank 512") and not served.notes[0].startswith(
        "m was cut"
    )
    low = apply_plan(plan_of(stays("a"), stays("b")), zoo, tmp_path / "low", max_rank=8)
    assert [r.rank for r in low.residents] == [8, 8] and low.residents[0].truncation_error > 0


def test_an_uncalibrated_score_stays_one_in_what_is_written(tmp_path, rng):
    zoo, _ = zoo_in(tmp_path / "zoo", rng, {n: {"modules": WIDE} for n in "ab"})
    for calibrated, group, said in (
        (False, [merges("m", "a", "b")], 1), (True, [merges("m", "a", "b")], 0),
        (False, [stays("a"), stays("b")], 0),
    ):  # fmt: skip
        plan = SimpleNamespace(groups=group, calibrated=calibrated)
        notes = apply_plan(plan, zoo, tmp_path / "out", overwrite=True).notes
        assert sum("uncalibrated score" in note for note in notes) == said


def test_an_adapter_that_the_router_cannot_pick_is_named(tmp_path, rng):
    recipes = {"a": {"modules": WIDE}, "b": {"modules": WIDE, "zero_b": True}}
    zoo, _ = zoo_in(tmp_path / "zoo", rng, recipes)
    served = apply_plan(plan_of(stays("a"), stays("b")), zoo, tmp_path / "out")
    assert "router: b has no prototype: arrow never picks it" in served.notes
    assert not any("a has no prototype" in note for note in served.notes)


BAD_PLANS = {
    "no such adapter": ([stays("a"), stays("z")], "z: the plan names it, and the zoo has none"),
    "one left out": ([stays("a")], "b: is in no group of the plan"),
    "in two groups": ([stays("a"), merges("m", "a", "b")], "a: the plan has it twice"),
    "twice in one": ([merges("m", "a", "a", "b")], "a: the plan has it twice"),
    "two to route": ([Group("m", ("a", "b"), "route")], "m: 2 adapters to route"),
    "an empty group": (
        [stays("a"), stays("b"), Group("m", (), "merge", "svd")], "m: 0 adapters to merge",
    ),
    "no such method": ([merges("m", "a", "b", method="magic")], "m: no merge method 'magic'"),
    "a name twice": ([merges("a", "b", weights=(1.0,)), stays("a")], "a: two resident adapters"),
    "no calibration": ([merges("m", "a", "b", method="regmean")], "calibration"),
    "bad argument": ([merges("m", "a", "b", method="svd", depth=1)], "depth"),
    "an argument of apply's own": (
        [Group("m", ("a", "b"), "merge", "svd", None, {"threads": 2})], "no argument 'threads'",
    ),
    "weights as an argument": (
        [Group("m", ("a", "b"), "merge", "svd", None, {"weights": [1, 1]})], "argument 'weights'",
    ),
    "nothing": ([], "plan: has no adapters"),
    "bad weights": ([merges("m", "a", "b", weights=(1.0,))], "weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_is_refused_and_leaves_nothing(tmp_path, rng, case):
    groups, reason = BAD_PLANS[case]
    zoo, _ = zoo_in(tmp_path / "zoo", rng, {n: {"modules": WIDE} for n in "ab"})
    with pytest.raises(InputError) as caught:
        apply_plan(plan_of(*groups), zoo, tmp_path / "new" / "out")
    assert reason in str(caught.value)
    assert os.listdir(tmp_path) == ["zoo"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_what_was_there(tmp_path, rng, overwrite):
    zoo, _ = zoo_in(tmp_path / "zoo", rng)
    plan = plan_of(merges("m", "a", "b"), stays("c"), stays("d"))
    if overwrite:
        apply_plan(plan, zoo, tmp_path / "out")
    before = everything_in(tmp_path)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan(plan, zoo, tmp_path / "out", overwrite=overwrite, progress=stop)
    assert everything_in(tmp_path) == before


def test_an_existing_folder_is_replaced_only_if_it_is_one_of_ours(tmp_path, rng):
    zoo, _ = zoo_in(tmp_path / "zoo", rng)
    everyone = plan_of(*map(stays, "abcd"))
    apply_plan(everyone, zoo, tmp_path / "out")
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        apply_plan(everyone, zoo, tmp_path / "out")
    merged = apply_plan(plan_of(merges("m", *"abcd")), zoo, tmp_path / "out", overwrite=True)
    assert read_served(tmp_path / "out") == merged
    assert os.listdir(tmp_path / "out" / "adapters") == ["m"]
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"holds 'mine\.txt', which this command does not write"):
        apply_plan(everyone, zoo, tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="would overwrite the input"):
        apply_plan(everyone, zoo, tmp_path / "zoo", overwrite=True)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_changed_since_it_was_opened_is_not_copied(tmp_path, rng, file):
    zoo, made = zoo_in(tmp_path / "zoo", rng, {"a": {"modules": WIDE, "rank": 3}})
    if file.endswith("json"):
        config = json.loads((made["a"].path / file).read_text())
        (made["a"].path / file).write_text(json.dumps(config | {"lora_alpha": 99}))
    else:
        make_adapter(made["a"].path, WIDE, rank=3, seed=seed_from(rng))
    with pytest.raises(InputError, match=rf"{file}: changed since"):
        apply_plan(plan_of(stays("a")), zoo, tmp_path / "out")
    assert os.listdir(tmp_path) == ["zoo"]


def test_what_peft_has_no_names_for_is_refused(tmp_path, rng):
    make_file(tmp_path / "a.safetensors")
    zoo = mpf.open_zoo([tmp_path / "a.safetensors"])
    with pytest.raises(InputError, match="a kohya file: PEFT and vLLM have other names"):
        apply_plan(plan_of(stays("a")), zoo, tmp_path / "out")


@pytest.mark.parametrize("group", ["merged", "as it is"])
def test_an_adapter_that_changed_since_the_plan_is_refused_by_name(tmp_path, rng, group):
    zoo, made = zoo_in(tmp_path / "zoo", rng)
    judge = HarmJudge(zoo.names, np.array([[0, 0, 1, 1], [0, 0, 1, 1], [1] * 4, [1] * 4]) * 0.9,
                      unavailable=dict.fromkeys(("reweight", "prune", "regmean"), "x"))  # fmt: skip
    known = [PlannedAdapter(a.name, str(a.path), None, f)
             for a, f in zip(zoo, fingerprints(zoo, 2), strict=True)]  # fmt: skip
    plan = make_plan(judge, known, Costs())
    assert [g.members for g in plan.merged] == [("a", "b")]
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert [a.fingerprint for a in plan.adapters] == [fingerprint(a) for a in zoo]
    plan.apply(tmp_path / "unchanged")
    name = "b" if group == "merged" else "d"
    (made[name].path / "README.md").write_text("notes may change, what is added to the base not")
    plan.apply(tmp_path / "notes")
    make_adapter(made[name].path, seed=seed_from(rng), modules=WIDE, rank=3)
    with pytest.raises(InputError, match="changed since the plan was made") as error:
        plan.apply(tmp_path / "changed")
    assert (error.value.path, error.value.key) == (str(made[name].path), name)
    assert not (tmp_path / "changed").exists()


def test_every_plan_of_files_has_their_fingerprints(tmp_path, rng):
    zoo, _ = zoo_in(tmp_path / "zoo", rng)
    model = mpf.RetentionPredictor({}, Recipe(), Facts(bases=("another",)))
    for threads in (1, 2):
        found = mpf.plan(zoo, model=model, threads=threads, curve=False)
        assert [a.fingerprint for a in found.adapters] == [fingerprint(a) for a in zoo]
