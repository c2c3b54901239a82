"""What was applied, in a model: PEFT's logits against dense weights, and the example."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("peft")
torch = pytest.importorskip("torch")
from adapters import make_adapter  # noqa: E402
from dense_merge import exact_sums, seed_from  # noqa: E402
from peft import PeftModel  # noqa: E402
from tiny_bases import WORDS, make_base  # noqa: E402
from tolerances import bound  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.io.router_file import load_router  # noqa: E402
from mergeprobe_fast.planning.artefacts import apply_plan  # noqa: E402
from mergeprobe_fast.planning.plan_types import Group  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks
LAYERS = "model.layers.{}.{}"
MODULES = {
    LAYERS.format(0, "self_attn.q_proj"): (16, 16, 3), LAYERS.format(1, "mlp.up_proj"): (24, 16, 3),
    LAYERS.format(2, "self_attn.v_proj"): (8, 16, 3),
}  # fmt: skip
NAMES = ("math v1.0", "code", "数学", "law")


@pytest.fixture
def applied(tmp_path, rng):
    """A tiny Llama, four adapters of it (the last with two scales), and a plan that was applied."""
    make_base(tmp_path / "base", seed=seed_from(rng))
    made = {
        name: make_adapter(
            tmp_path / "zoo" / name, MODULES, seed=seed_from(rng), magnitude=0.3,
            alphas={LAYERS.format(1, "mlp.up_proj"): 2} if name == "law" else None,
        )
        for name in NAMES
    }  # fmt: skip
    zoo = mpf.open_zoo([m.path for m in made.values()])
    plan = SimpleNamespace(groups=[
        Group("the merged one", ("math v1.0", "数学"), "merge", "linear", (0.7, 0.4)),
        Group("code", ("code",), "route"), Group("law", ("law",), "route"),
    ])  # fmt: skip
    served = apply_plan(plan, zoo, tmp_path / "out")
    deltas = {
        "the merged one": exact_sums([made["math v1.0"], made["数学"]], (0.7, 0.4)),
        "code": exact_sums([made["code"]], [1.0]),
        "law": exact_sums([made["law"]], [1.0]),
    }
    return SimpleNamespace(base=tmp_path / "base", served=served, deltas=deltas)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dense_logits(folder, deltas, ids):
    """Of a fresh base whose weights are w + delta, summed in float64."""
    model = load(folder)
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_submodule(name).weight
            weight.copy_(torch.tensor(weight.numpy().astype(np.float64) + delta))
        return model(input_ids=ids).logits.numpy()


@QUIET
def test_the_logits_of_every_folder_are_those_of_dense_weights(applied, rng, one_thread):
    ids = torch.tensor(rng.integers(2, 40, (3, 11)))
    scale = np.abs(dense_logits(applied.base, {}, ids)).max()
    close = 4 * bound("likelihood") * max(scale, 1)
    for name, deltas in applied.deltas.items():
        expected = dense_logits(applied.base, deltas, ids)
        model = PeftModel.from_pretrained(load(applied.base), str(applied.served.folder(name)))
        with torch.no_grad():
            found = model.eval()(input_ids=ids).logits.numpy()
        assert np.abs(found - expected).max() < close, name
        some = {n: 1.001 * d for n, d in deltas.items()}  # the fault: a weight off by a thousandth
        assert np.abs(dense_logits(applied.base, some, ids) - expected).max() > close


@pytest.fixture
def route(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("route", "tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("route")


@QUIET
def test_the_example_asks_the_adapter_that_the_router_picks(applied, route, rng, one_thread):
    base = route.load_base(applied.base)
    routed = route.Routed(base, applied.served.path)
    router = load_router(applied.served.path)
    plain = load(applied.base)
    for _ in range(4):
        prompt = " ".join(rng.choice(WORDS, 7))
        ids = base.encode(prompt)
        with torch.no_grad():
            hidden = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            q = plain.model.layers[0].input_layernorm(hidden[0])[0].numpy()
        choice, written = routed.answer(prompt, 3)
        with routed.model.disable_adapter(), route.recorded_inputs(
            routed.model.get_base_model(), router.modules
        ) as inputs, torch.no_grad():
            routed.model(input_ids=torch.tensor([ids]))
        np.testing.assert_allclose(inputs[LAYERS.format(0, "self_attn.q_proj")], q, atol=1e-5)
        assert choice == router.choose(inputs) and choice.adapter in applied.deltas
        expected = list(ids)
        for _ in range(3):
            logits = dense_logits(applied.base, applied.deltas[choice.adapter],
                                  torch.tensor([expected]))  # fmt: skip
            expected.append(int(logits[0, -1].argmax()))
        assert written == base.decode(expected[len(ids) :]).strip()


@QUIET
def test_the_example_is_a_command(applied, route, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "route.py", str(applied.served.path), "w1 w2 w3", "--base", str(applied.base),
        "--rule", "arrow",
    ])  # fmt: skip
    assert route.main() == 0
    first, prompt, _ = capsys.readouterr().out.splitlines()
    assert first.removesuffix(" (arrow)") in applied.deltas and prompt == "  'w1 w2 w3'"


def test_the_example_has_a_prompt_for_each_domain(route):
    prompts = route.example_prompts()
    assert len(prompts) == len(set(prompts)) == len(route.DOMAINS)


@QUIET
def test_the_example_refuses_a_router_of_other_adapters(applied, route, tmp_path, rng):
    zoo = mpf.open_zoo([make_adapter(tmp_path / "x", MODULES, seed=seed_from(rng)).path])
    apply_plan(SimpleNamespace(groups=[Group("x", ("x",), "route")]), zoo, tmp_path / "two")
    for name in ("router.json", "router.safetensors"):
        (applied.served.path / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(SystemExit, match="the router is not of these adapters"):
        route.Routed(route.load_base(applied.base), applied.served.path)
