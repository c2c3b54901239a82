"""MERGE-PEFT off the CPU, and on models that cannot be cut in two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import make_adapter
from tolerances import bound

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_bases  # noqa: E402
from other_device import DEVICE, OtherDevice, moved  # noqa: E402
from tiny_items import (  # noqa: E402
    HIDDEN,
    SHAPES,
    character_tokenizer,
    draw_item,
    make_character_base,
    token_log_likelihoods,
)

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.model import batches  # noqa: E402
from mergeprobe_fast.merge_peft.model.base import Base, load_base  # noqa: E402
from mergeprobe_fast.merge_peft.model.suffix import Suffix  # noqa: E402
from mergeprobe_fast.merge_peft.model.whole import WholeModel, layer_prefix  # noqa: E402
from mergeprobe_fast.merge_peft.stages import evaluate  # noqa: E402
from mergeprobe_fast.merge_peft.stages.evaluate import Evaluation  # noqa: E402
from mergeprobe_fast.merge_peft.tasks.item import END_OF_TURN, Item  # noqa: E402
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe  # noqa: E402

ROUNDING = bound("likelihood")
KINDS = ("exact", "choice", "refusal", "code")
SIZES = tiny_bases.CONFIGS["Llama"]
CUT = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
WHOLE = ("Windowed", "Gemma3Text", "Phi3", "GPT2", "GPTNeoX", "OPT", "Bloom", "Mixtral")


@pytest.fixture(autouse=True)
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written is right when it has an even number of characters; it is kept."""
    written: list[str] = []

    def verdicts(items: Any, answers: Any) -> list[bool]:
        written.extend(answers)
        return [len(answer) % 2 == 0 for answer in answers]

    monkeypatch.setattr(evaluate, "check_many", verdicts)
    return written


def make(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A random model of a kind, reading characters."""
    more = {
        "Mistral": {"sliding_window": None}, "Windowed": {"sliding_window": 3},
        "Gemma": {"head_dim": 4}, "Qwen3": {"head_dim": 4},
    }  # fmt: skip
    name = "Mistral" if kind == "Windowed" else kind
    known = {} if kind == "Windowed" else tiny_bases.CONFIGS
    monkeypatch.setitem(tiny_bases.CONFIGS, name, known.get(name, {**SIZES, **more.get(kind, {})}))
    tiny_bases.make_base(folder, name)
    return Base(tiny_bases.load(folder, torch.float32), character_tokenizer(), kind, "")


def truth(model: Any, base: Base, items: list[Item]) -> np.ndarray:
    """loglik of every target, a whole pass in float64 for each; torch's experts have none."""
    wide = copy.deepcopy(model)
    wide = wide if hasattr(model.config, "num_local_experts") else wide.double()
    return np.array(
        [token_log_likelihoods(wide, base, i.prompt, i.target)[0].mean() for i in items]
    )


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_any_model_gives_the_scores_of_whole_passes(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str,
    no_sandbox: list[str],
) -> None:  # fmt: skip
    base = make(tmp_path / "base", kind, monkeypatch)
    items = [draw_item(rng, k) for _ in range(3) for k in KINDS]
    items.append(draw_item(rng, "exact", check={"write": 9}))
    evaluation = Evaluation(items, base, 1, threads=1)
    assert isinstance(base.runner(1), Suffix if kind in CUT else WholeModel)
    scores = evaluation.run()
    expected = truth(base.model, base, items)
    # Norms of float64 copies still go through float32.
    assert np.abs(scores.loglik - expected).max() <= 3 * ROUNDING
    assert np.abs(expected - expected.mean()).max() > 1000 * ROUNDING
    sure = 0
    # Code is written first, in its order, and a turn after it.
    for item, found in zip(
        [i for i in items if i.kind == "code"] + items[-1:], no_sandbox, strict=True
    ):
        text, margin = greedily(base, item)
        if margin > 3 * ROUNDING:
            assert found == text
            sure += 1
    assert sure >= 2 and len(no_sandbox) == 4


def greedily(base: Base, item: Item) -> tuple[str, float]:
    """What the model writes, a whole pass for each token, and its closest call."""
    ends = ("\n", END_OF_TURN) if item.kind == "code" else (END_OF_TURN,)
    most = item.check.get("write", evaluate.WRITTEN_TOKENS)
    ids, written, margin = base.encode(item.prompt), [], np.inf
    while len(written) < most and not (written and base.decode(written[-1:]) in ends):
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        best, second = logits[0, -1].topk(2).values.tolist()
        margin = min(margin, best - second)
        written.append(int(logits[0, -1].argmax()))
    text = base.decode(written)
    for end in ends:
        text = text.removesuffix(end)
    return text, margin


def test_a_wrong_place_of_an_answer_would_be_noticed(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(tmp_path / "base", "GPT2", monkeypatch)
    items = [draw_item(rng, "choice") for _ in range(4)]
    expected, plain = truth(base.model, base, items), batches.pack

    def broken(head: list[int], tails: list[list[int]]) -> batches.Row:
        row = plain(head, tails)
        return batches.Row(**{**vars(row), "positions": np.arange(len(row)).clip(0, len(head))})

    monkeypatch.setattr(batches, "pack", broken)
    off = np.abs(Evaluation(items, base, 0, threads=1).run().loglik - expected).max()
    assert off > 1000 * ROUNDING


# Of the test's own use of PEFT.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_of_a_whole_model_are_trained_and_measured(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", exc_type=ImportError)
    from peft import PeftModel

    from mergeprobe_fast.merge_peft.stages.train import train

    monkeypatch.setitem(tiny_bases.CONFIGS, "OPT", {**tiny_bases.CONFIGS["OPT"], "dropout": 0.3})
    for kind, projections, variant in (
        ("Gemma3Text", ("q_proj", "down_proj"), "lora"), ("OPT", ("q_proj", "fc1"), "osrm"),
    ):  # fmt: skip
        base = make(tmp_path / kind, kind, monkeypatch)
        items = [draw_item(rng, "exact", target="yes.\n") for _ in range(12)]
        others = [draw_item(rng, "exact", "other") for _ in range(5)]
        recipe = Recipe(
            "any", rank=2, alpha=4, lr=2e-2, steps=20, batch=4, layers=(0, 1), seed=3,
            projections=projections, variant=variant,
        )  # fmt: skip
        folders = [tmp_path / f"{kind}-{i}" for i in range(2)]
        for out in folders:
            train(recipe, base, items + others, out, None, threads=1)
        one, two = ((f / "adapter_model.safetensors").read_bytes() for f in folders)
        assert one == two  # no dropout
        evaluation = Evaluation(items, base, 0, threads=1)
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(folders[0]))
        expected = truth(model.merge_and_unload(), base, items)
        trained, before = evaluation.run(folders[0]).loglik, evaluation.run().loglik
        assert np.abs(trained - expected).max() <= 5 * ROUNDING
        assert trained.mean() > before.mean() + 1000 * ROUNDING
        with pytest.raises(mpf.InputError, match="has no such module"):
            name = f"{layer_prefix(base.model)}1.mlp.other"
            evaluation.run(make_adapter(tmp_path / f"{kind}-bad", {name: (3, 3, 1)}).path)


def test_a_model_that_mixes_its_batch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(tmp_path / "base", "GPT2", monkeypatch)
    plain = base.model.transformer.wte.forward

    def mixing(ids: torch.Tensor) -> torch.Tensor:
        return plain(ids) + ids.shape[0] * torch.arange(16)

    monkeypatch.setattr(base.model.transformer.wte, "forward", mixing)
    with pytest.raises(mpf.InputError, match="what else is in the batch"):
        base.runner(0)
    with pytest.raises(mpf.InputError, match="layers 0 to 1"):
        base.runner(2)


def test_nothing_is_computed_on_two_devices_at_once(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Training, evaluation and writing, on a stand-in for a GPU: no GPU was there to test on."""
    pytest.importorskip("peft", exc_type=ImportError)
    from mergeprobe_fast.merge_peft.stages.train import train

    items = [draw_item(rng, kind) for _ in range(4) for kind in KINDS]
    items += [draw_item(rng, "exact", "other") for _ in range(4)]
    recipes = [
        Recipe("any", rank=3, alpha=6, lr=2e-2, steps=6, batch=4, layers=(1, 2), variant=variant)
        for variant in ("lora", "osrm")
    ]
    found = {}
    for where in ("cpu", "there"):
        base = make_character_base(tmp_path / where)
        base.model.set_attn_implementation("eager")  # others choose by the kind of device
        with OtherDevice() as mode:
            if where == "there":
                base = Base(moved(base.model), character_tokenizer(), "test/base", "seed 0")
                assert base.device.type == DEVICE.type
            for recipe in recipes:
                train(recipe, base, items, tmp_path / f"{where}-{recipe.variant}", None, threads=1)
            evaluation = Evaluation(items, base, 1, threads=1)
            found[where] = [
                evaluation.run(delta).loglik
                for delta in (None, *(tmp_path / f"{where}-{r.variant}" for r in recipes))
            ]
        assert (mode.seen > 1000) == (where == "there")
    untrained, *trained = (np.abs(a - b).max() for a, b in zip(*found.values(), strict=True))
    assert untrained <= 10 * ROUNDING
    # Adam divides each gradient by its own size: six steps make rounding of small ones larger.
    assert max(trained) <= 200 * ROUNDING


def test_the_stand_in_refuses_what_a_gpu_would(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_character_base(tmp_path / "base")
    made.model.set_attn_implementation("eager")
    items = [draw_item(rng, "exact")]
    adapter = make_adapter(tmp_path / "a", {f"model.layers.1.{n}": (*SHAPES[n], 2) for n in SHAPES})
    with OtherDevice():
        base = Base(moved(made.model), character_tokenizer(), "test/base", "")
        there = torch.zeros(2, device=DEVICE) + 1
        for fault in (lambda: there + torch.ones(2), lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                fault()
        evaluation = Evaluation(items, base, 1, threads=1)
        evaluation.run(adapter.path)
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
        with pytest.raises(RuntimeError, match="both devices"):
            evaluation.run(adapter.path)


def test_batches_are_larger_off_the_cpu(rng: np.random.Generator) -> None:
    rows = [batches.pack([1] * 90, [[2] * 11]) for _ in range(60)]
    assert len(list(batches.cut(rows, torch.device("cpu")))) == 3
    with OtherDevice():
        ((chosen, batch),) = batches.cut(rows, DEVICE)
    assert chosen == list(range(60)) and batch.ids.shape == (60, 100)
    assert batch.ids.device == batch.mask.device == batch.labels.device == DEVICE


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    tiny_bases.make_base(tmp_path / "base")
    assert load_base(tmp_path / "base", "cpu").device.type == "cpu"
    absent = [] if torch.cuda.is_available() else ["cuda", "cuda:1"]
    for name in ("meta", "no such thing", *absent):
        with pytest.raises(mpf.InputError, match="cannot be used") as caught:
            load_base(tmp_path / "base", name)
        assert caught.value.key == "device"
    assert HIDDEN == load_base(tmp_path / "base").model.config.hidden_size
