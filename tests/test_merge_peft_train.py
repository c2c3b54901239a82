"""Adapters trained by MERGE-PEFT: what is learnt, what is written, and what is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import delta_of, read_factor
from tolerances import bound

pytestmark = pytest.mark.usefixtures("one_thread")
torch = pytest.importorskip("torch")
pytest.importorskip("peft", exc_type=ImportError)
pytest.importorskip("transformers")

from tiny_items import (  # noqa: E402
    SHAPES,
    draw_item,
    make_character_base,
    token_log_likelihoods,
    wide_copy,
)

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.io.probe import open_run  # noqa: E402
from mergeprobe_fast.merge_peft.model.base import Base  # noqa: E402
from mergeprobe_fast.merge_peft.stages import train as train_module  # noqa: E402
from mergeprobe_fast.merge_peft.stages.evaluate import Evaluation  # noqa: E402
from mergeprobe_fast.merge_peft.stages.initial import FLY_SHARE, quiet_rows, random_rows  # noqa: E402
from mergeprobe_fast.merge_peft.stages.train import train  # noqa: E402
from mergeprobe_fast.merge_peft.tiers.recipe import Recipe  # noqa: E402

# Of the tests' own use of PEFT; the package answers for its own.
loads_with_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
RECIPE = Recipe("any", rank=3, alpha=6, lr=2e-2, steps=20, batch=4, layers=(1, 2), seed=3)
NAMES = [f"model.layers.{i}.{name}" for i in (1, 2) for name in SHAPES]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_character_base(tmp_path_factory.mktemp("base") / "base")


def draw_items(rng: np.random.Generator, domain: str = "any", count: int = 12) -> list[Any]:
    """Items that can be learnt: the answer is always the same."""
    return [draw_item(rng, "exact", domain, target="yes.\n") for _ in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def factors(folder: Path, side: str) -> dict[str, np.ndarray]:
    return {n: read_factor(getattr(m, side)) for n, m in mpf.open_zoo(folder)[0].modules.items()}


def loss_of(model: Any, base: Base, items: list[Any]) -> torch.Tensor:
    """Mean over all target tokens of -log p, a whole pass for each text."""
    losses = []
    for item in items:
        head, tail = base.encode(item.prompt), base.encode(item.target)
        logits = model(input_ids=torch.tensor([head + tail])).logits[0].double()
        rows = torch.log_softmax(logits, -1)[len(head) - 1 : -1]
        losses.append(-rows.gather(1, torch.tensor(tail)[:, None])[:, 0])
    return torch.cat(losses).mean()


def error(call: Callable[[], Any]) -> mpf.InputError:
    with pytest.raises(mpf.InputError) as caught:
        call()
    return caught.value


@loads_with_peft
def test_training_teaches_and_writes_what_peft_and_the_package_read(tmp_path, rng, base):
    from peft import PeftModel

    items = draw_items(rng)
    longer = replace(RECIPE, steps=60, lr=5e-2)
    result = train(longer, base, items, tmp_path / "a", tmp_path / "probes")
    assert result.loss < 0.8 * result.first_loss and result.items == 12 and result.seconds > 0
    evaluation = Evaluation(items, base, 1)
    assert evaluation.run(tmp_path / "a").loglik.mean() > evaluation.run().loglik.mean() + 0.5
    (adapter,) = mpf.open_zoo(tmp_path / "a")
    assert list(adapter.modules) == sorted(NAMES) and adapter.base_model == "test/base"
    assert {m.rank for m in adapter.modules.values()} == {3}
    assert {m.scale for m in adapter.modules.values()} == {2.0}
    model = PeftModel.from_pretrained(wide_copy(base), str(tmp_path / "a")).double()
    ours = wide_copy(base, {n: delta_of(m) for n, m in adapter.modules.items()})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        gap = (model(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max()
    assert gap < bound("likelihood")


@loads_with_peft
def test_the_first_loss_and_the_gradients_are_those_of_whole_passes(tmp_path, rng, base):
    """Probes hold what autograd in float64 says of the whole model at the snapshot's factors."""
    from peft import PeftModel

    items = draw_items(rng, count=4)  # one batch is all of them
    recipe = replace(RECIPE, steps=10)
    result = train(recipe, base, items, tmp_path / "a", tmp_path / "probes")
    with torch.no_grad():
        whole = float(loss_of(wide_copy(base), base, items))
    assert abs(result.first_loss - whole) < bound("likelihood")
    (snapshot,) = open_run(tmp_path / "probes").snapshots  # all planned steps are the first one
    found = {name: snapshot.gradients(name, "last") for name in snapshot.info.modules}

    def off(given: list[Any]) -> float:
        model = PeftModel.from_pretrained(wide_copy(base), str(snapshot.path)).double()
        pairs = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                pair = layer.lora_A.default.weight, layer.lora_B.default.weight
                pairs[name.removeprefix("base_model.model.")] = pair
        for parameter in (p for pair in pairs.values() for p in pair):
            parameter.requires_grad_(True)
        loss_of(model, base, given).backward()
        size = max(float(p.grad.norm()) for pair in pairs.values() for p in pair)
        return max(
            float(np.abs(ours - theirs.grad.numpy()).max()) / size
            for name, pair in pairs.items()
            for ours, theirs in zip(found[name], pair, strict=True)
        )

    assert off(items) < bound("autograd")
    assert off(items[:3]) > 10 * bound("autograd")
    assert snapshot.info.notes == ()


def test_the_base_is_as_it_was_after_training_and_after_a_failure(tmp_path, rng, base, monkeypatch):
    modules = [(n, id(m)) for n, m in base.model.named_modules()]
    weights = {n: (id(p), p.detach().clone()) for n, p in base.model.named_parameters()}
    items = draw_items(rng)
    train(RECIPE, base, items, tmp_path / "a", None)

    def stop(step: int, steps: int) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return 1.0

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "_rate", stop)
        train(RECIPE, base, items, tmp_path / "b", tmp_path / "probes")
    assert sorted(os.listdir(tmp_path)) == ["a", "probes"]
    assert [(n, id(m)) for n, m in base.model.named_modules()] == modules
    for name, parameter in base.model.named_parameters():
        was, value = weights[name]
        assert id(parameter) == was and torch.equal(parameter, value)
        assert not parameter.requires_grad
    train(RECIPE, base, items, tmp_path / "b", tmp_path / "probes")  # what is left is replaced
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert open_run(tmp_path / "probes").snapshots


def test_the_same_recipe_gives_the_same_bytes_and_seeds_matter(tmp_path, rng, base):
    items = draw_items(rng)
    for run in ("1", "2"):
        train(RECIPE, base, items, tmp_path / run / "a", tmp_path / run / "probes")
    assert files(tmp_path / "1") == files(tmp_path / "2")
    weights = "a/adapter_model.safetensors"
    for n, change in enumerate(({"seed": 4}, {"init_seed": 1}, {"lr": 1e-2}, {"batch": 3})):
        train(replace(RECIPE, **change), base, items, tmp_path / f"c{n}" / "a", None)
        assert files(tmp_path / f"c{n}")[weights] != files(tmp_path / "1")[weights]


def test_one_init_seed_is_one_first_a_whatever_the_rank(tmp_path, rng, base):
    still = replace(RECIPE, lr=1e-9, steps=2)
    items = draw_items(rng)
    train(still, base, items, tmp_path / "a", None)
    train(replace(still, rank=5), base, items, tmp_path / "b", None)
    small, large = factors(tmp_path / "a", "a"), factors(tmp_path / "b", "a")
    for name in NAMES:
        assert np.abs(small[name] - large[name][:3]).max() < 1e-6
        limit = small[name].shape[1] ** -0.5
        assert np.abs(large[name]).max() <= limit + 1e-6
    assert np.abs(small[NAMES[0]] - small[NAMES[1]]).max() > 0.01
    many = random_rows("x", 400, 50, 0) * 50**0.5  # uniform: variance 1 / 3, and no correlation
    assert abs(many.var() - 1 / 3) < 0.02 and abs(many.mean()) < 0.02


def test_flylora_trains_b_over_a_frozen_sparse_a(tmp_path, rng, base):
    fly = replace(RECIPE, variant="flylora")
    items = draw_items(rng)
    train(replace(fly, steps=1), base, items, tmp_path / "one", None)
    result = train(fly, base, items, tmp_path / "a", tmp_path / "probes")
    assert result.loss < result.first_loss
    first, last = factors(tmp_path / "one", "a"), factors(tmp_path / "a", "a")
    for name in NAMES:
        assert np.array_equal(first[name], last[name])
        share = max(1, int(first[name].shape[1] * FLY_SHARE))
        assert (np.count_nonzero(first[name], axis=1) == share).all()
    assert all(b.any() for b in factors(tmp_path / "a", "b").values())
    info = open_run(tmp_path / "probes").snapshots[-1].info
    assert info.learning_rate_groups["A"] == 0 < info.learning_rate_groups["B"]
    assert info.notes == ()


def dense_moments(base: Base, items: list[Any]) -> dict[str, np.ndarray]:
    """Mean x x^T in float64 of what whole passes feed every module, a text at a time."""
    model, sums, count = wide_copy(base), {}, 0

    def hook(name: str) -> Any:
        def add(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            x = given[0][0].numpy()
            sums[name] = sums.get(name, 0) + x.T @ x
        return add

    for name in NAMES:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    for item in items:
        ids = (base.encode(item.prompt) + base.encode(item.target))[:-1]  # the last is no input
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        count += len(ids)
    return {name: total / count for name, total in sums.items()}


def test_osrm_starts_where_the_other_domains_have_least(tmp_path, rng, base):
    mine, others = draw_items(rng), [draw_item(rng, "exact", "other") for _ in range(40)]
    still = replace(RECIPE, lr=1e-9, steps=2, variant="osrm")
    train(still, base, mine + others, tmp_path / "a", None)
    moments = dense_moments(base, others)
    for name, a in factors(tmp_path / "a", "a").items():
        values, vectors = np.linalg.eigh(moments[name])
        assert np.abs(a @ a.T - np.eye(3)).max() < 1e-5
        energy = np.trace(a @ moments[name] @ a.T)
        # Off by the rounding of a float32 Gram, relative to its largest eigenvalue.
        room = 1e-5 * values[-1]
        assert energy <= values[:3].sum() + room
        for fault in (random_rows(name, 3, len(values), 0), vectors[:, -3:].T,
                      quiet_rows(np.linalg.inv(moments[name]), 3)):  # fmt: skip
            assert np.trace(fault @ moments[name] @ fault.T) > values[:3].sum() + room
    failed = error(lambda: train(still, base, mine, tmp_path / "b", None))
    assert failed.reason == "osrm needs items of other domains"


def test_what_was_trained_is_not_trained_again(tmp_path, rng, base):
    items = draw_items(rng)
    a, probes = tmp_path / "a", tmp_path / "probes"
    first = train(RECIPE, base, items, a, probes)
    before = files(tmp_path)
    again = train(RECIPE, base, items, a, probes)
    assert again == replace(first, seconds=None) and files(tmp_path) == before
    for call, key in (
        (lambda: train(replace(RECIPE, lr=1e-3), base, items, a, probes), "recipe"),
        (lambda: train(RECIPE, base, items[1:], a, probes), "items"),
        (lambda: train(RECIPE, base, items[::-1], a, probes), "texts_sha256"),
        (lambda: train(RECIPE, base, items, a, probes, dtype="bfloat16"), "dtype"),
    ):
        failed = error(call)
        assert failed.key == key and "another training" in failed.reason
    (tmp_path / "foreign").mkdir()
    failed = error(lambda: train(RECIPE, base, items, tmp_path / "foreign", None))
    assert failed.reason == "exists and has no training.json"
    failed = error(lambda: train(RECIPE, base, items, a, tmp_path / "gone"))
    assert failed.path == str(tmp_path / "gone") and "is missing" in failed.reason


def test_bfloat16_rounds_what_float32_writes(tmp_path, rng, base):
    items = draw_items(rng)
    for dtype in ("float32", "bfloat16"):
        train(RECIPE, base, items, tmp_path / dtype, None, dtype=dtype)
    for side in "ab":
        exact, rounded = factors(tmp_path / "float32", side), factors(tmp_path / "bfloat16", side)
        for name in NAMES:
            expected = torch.from_numpy(exact[name]).to(torch.bfloat16).double().numpy()
            assert np.array_equal(rounded[name], expected)
    module = mpf.open_zoo(tmp_path / "bfloat16")[0].modules[NAMES[0]]
    assert module.a.dtype == module.b.dtype == "BF16"


def test_only_the_tasks_of_a_recipe_are_trained_on(tmp_path, rng, base):
    items = [*draw_items(rng), *draw_items(rng, "other", 5),
             *(draw_item(rng, "choice") for _ in range(7))]  # fmt: skip
    assert train(RECIPE, base, items, tmp_path / "a", None).items == 19
    one = replace(RECIPE, tasks=("any.choice",), projections=("q_proj", "down_proj"),
                  layers=(2, 2))  # fmt: skip
    assert train(one, base, items, tmp_path / "b", None).items == 7
    assert list(mpf.open_zoo(tmp_path / "b")[0].modules) == [
        "model.layers.2.mlp.down_proj", "model.layers.2.self_attn.q_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "key"), [
    ({"rank": 0}, "rank"), ({"steps": 1.5}, "steps"), ({"batch": True}, "batch"),
    ({"seed": -1}, "seed"), ({"lr": 0.0}, "lr"), ({"alpha": float("nan")}, "alpha"),
    ({"variant": "dora"}, "variant"), ({"layers": (2, 1)}, "layers"),
    ({"projections": ()}, "projections"), ({"projections": ("q_proj",) * 2}, "projections"),
])  # fmt: skip
def test_recipes_without_sense_are_refused(change, key):
    assert error(lambda: replace(RECIPE, **change)).key == key


def test_trainings_that_cannot_be_are_refused_and_write_nothing(tmp_path, rng, base):
    items = draw_items(rng)
    for change, given, key in (
        ({"domain": "none"}, {}, "items"), ({"layers": (1, 3)}, {}, "layers"),
        ({"projections": ("q_proj", "x_proj")}, {}, "layers"), ({}, {"dtype": "int8"}, "dtype"),
        ({"lr": 1e30}, {}, "lr"),
    ):  # fmt: skip
        recipe = replace(RECIPE, **change)
        assert error(lambda r=recipe, g=given: train(r, base, items, tmp_path / "a", None, **g)
                     ).key == key  # fmt: skip
    assert not os.listdir(tmp_path)
    assert token_log_likelihoods(base.model, base, "abc", "d")[0] < 0  # the base still runs
