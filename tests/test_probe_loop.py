"""record() in plain loops: scalers, optimisers, adapters, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from lora_training import (
    batches_of,
    error,
    factors,
    gradient_error,
    last,
    make_llama,
    make_lora,
    mean_of_losses,
    overflowing,
    sgd,
    train,
    trained_parameters,
    truth,
)
from peft import LoraConfig, PeftModel
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.io.probe import open_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT asks for it
    ),
]
EACH = tuple(s / 12 for s in range(1, 6))


def expected(snapshot, batches, accumulation=1, base=None, first=None):
    first = snapshot.steps * accumulation if first is None else first
    step = batches[first : first + accumulation]
    return truth(snapshot, lambda model: mean_of_losses(model, step), base)


def snapshots_of(tmp_path, model, fit, **arguments):
    given = {"total_steps": 12, "fractions": EACH} | arguments
    with mpf.record.record(model, tmp_path / "run", **given) as probe:
        fit(probe)
    return open_run(tmp_path / "run").snapshots


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_plain_loop_needs_one_line(tmp_path, rng, accumulation, set_to_none):
    model, batches = make_lora(), batches_of(rng, 12 * accumulation)
    found = snapshots_of(tmp_path, model, lambda _: train(
        model, batches, sgd(model), accumulation=accumulation, clip=0.01, set_to_none=set_to_none,
    ))  # fmt: skip
    assert [s.steps for s in found] == [1, 2, 3, 4, 5]
    for snapshot in found:
        snapshot.check()
        at = expected(snapshot, batches, accumulation)
        assert gradient_error(snapshot, at) < bound("autograd")
        info = snapshot.info
        assert info.loss.last == pytest.approx(at.loss, rel=1e-5)
        assert (info.micro_batches, info.optimizer, info.skipped_steps) == (accumulation, "SGD", 0)
        assert 0 < info.clip.last < 1 and info.notes == () and info.learning_rate == 0.5
        assert info.learning_rate_integral == pytest.approx(0.5 * info.steps, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradscaler_is_divided_out_and_skipped_steps_are_none(tmp_path, rng, fused, given, clip):
    model, batches = make_lora(), batches_of(rng, 13)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    found = snapshots_of(
        tmp_path, model,
        lambda _: train(model, batches, optimizer, scaler=scaler, clip=clip,
                        before=overflowing(model, 2)),
        **({"scaler": scaler, "optimizer": optimizer} if given else {}),
    )  # fmt: skip
    assert [s.steps for s in found] == [1, 2, 3, 4, 5]
    for snapshot in found:
        snapshot.check()
        skipped = int(snapshot.steps >= 2)
        at = expected(snapshot, batches, first=snapshot.steps + skipped)
        assert gradient_error(snapshot, at) < bound("autograd")
        assert snapshot.info.skipped_steps == skipped
        assert snapshot.info.loss.last == pytest.approx(at.loss, rel=1e-5)
        assert (snapshot.info.clip.last < 1) == (clip is not None)
        assert snapshot.info.micro_batches == 1
    scales = [s.info.loss_scale for s in found]
    assert scales == [4096.0, 4096.0, 4096.0, 8192.0, 8192.0]


def test_a_fused_optimiser_that_unscales_for_itself(tmp_path, rng):
    class Fused(torch.optim.SGD):
        """What GradScaler asks of optimisers that get ``grad_scale`` and ``found_inf``."""

        _step_supports_amp_scaling = True

        @torch.no_grad()
        def step(self, closure=None):
            if not self.found_inf:
                for p in self.param_groups[0]["params"]:
                    p.add_(p.grad / self.grad_scale, alpha=-0.5)

    model, batches = make_lora(), batches_of(rng, 13)
    optimizer = Fused(trained_parameters(model), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)

    found = snapshots_of(tmp_path, model, lambda _: train(
        model, batches, optimizer, scaler=scaler, before=overflowing(model, 1)
    ))  # fmt: skip
    for snapshot in found:
        at = expected(snapshot, batches, first=snapshot.steps + 1)
        assert gradient_error(snapshot, at) < bound("autograd")
        assert (snapshot.info.skipped_steps, snapshot.info.clip.last) == (1, 1.0)
        assert snapshot.info.loss_scale == 2048.0


def test_a_step_that_calls_the_step_of_its_class_is_one(tmp_path, rng):
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, batches = make_lora(), batches_of(rng, 12)
    optimizer = Mine(trained_parameters(model), lr=0.5)
    found = snapshots_of(tmp_path, model, lambda _: train(model, batches, optimizer))
    assert [s.info.window for s in found] == [2, 1, 1, 1, 1]
    for snapshot in found:
        assert gradient_error(snapshot, expected(snapshot, batches)) < bound("autograd")


def test_float16_factors_under_autocast_and_a_scaler(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found = snapshots_of(tmp_path, model, lambda _: train(
        model, batches, sgd(model, lr=0.1), scaler=scaler, autocast=torch.float16
    ))  # fmt: skip
    for snapshot in found:
        snapshot.check()
        at = expected(snapshot, batches)
        assert gradient_error(snapshot, at) < bound("autograd bf16")
        assert snapshot.info.loss.last == pytest.approx(at.loss, rel=5e-3)


@pytest.mark.parametrize("config", [
    {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}}, {"use_rslora": True},
    {"target_modules": ["embed_tokens", "q_proj"]},
], ids=["patterns", "rslora", "embedding"])  # fmt: skip
def test_peft_loads_the_very_factors(tmp_path, rng, config):
    model, batches = make_lora(**config), batches_of(rng, 12)
    kept = {}
    optimizer = sgd(model)
    found = snapshots_of(tmp_path, model, lambda _: train(
        model, batches, optimizer, before=lambda step: kept.update({step: factors(model)})
    ))  # fmt: skip
    for snapshot in found:
        snapshot.check()
        loaded = PeftModel.from_pretrained(make_llama(), str(snapshot.path))
        again = factors(loaded)
        assert again.keys() == kept[snapshot.steps].keys()
        for name, weight in kept[snapshot.steps].items():
            assert torch.equal(again[name], weight) and again[name].dtype == weight.dtype
        scales = {
            n.removeprefix("base_model.model."): layer.scaling["default"]
            for n, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
        }  # fmt: skip
        assert {n: m.scale for n, m in snapshot.adapter.modules.items()} == scales
        assert loaded.peft_config["default"].inference_mode


def test_one_of_two_adapters_is_recorded_and_the_other_left_alone(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    with torch.no_grad():
        for parameter in factors(model, "other"):
            model.get_parameter(parameter).normal_()
    model.set_adapter("default")
    untouched = factors(model, "other")
    found = snapshots_of(
        tmp_path, model, lambda _: train(model, batches, sgd(model)), adapter="default"
    )
    assert {s.info.adapter_name for s in found} == {"default"} and len(found) == 5
    assert gradient_error(found[2], expected(found[2], batches)) < bound("autograd")
    assert all(torch.equal(w, untouched[n]) for n, w in factors(model, "other").items())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(mpf.InputError, match=r"2 adapters are active \(default, other\); name one"):
        mpf.record.record(model, tmp_path / "x", total_steps=9, fractions=(0.5,)).__enter__()
    with pytest.raises(mpf.InputError, match="nobody: no such adapter; the model has default, ot"):
        mpf.record.record(
            model, tmp_path / "x", total_steps=9, fractions=(0.5,), adapter="nobody"
        ).__enter__()
    assert not (tmp_path / "x").exists()


def test_rates_that_differ_are_told_apart(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)
    a = [p for n, p in model.named_parameters() if "lora_A" in n]
    b = [p for n, p in model.named_parameters() if "lora_B" in n]
    optimizer = torch.optim.SGD([{"params": a, "lr": 0.1}, {"params": b, "lr": 1.6}])
    found = snapshots_of(tmp_path, model, lambda _: train(model, batches, optimizer))
    info = found[-1].info
    assert info.learning_rate_groups == {"A": 0.1, "B": 1.6}
    assert info.learning_rate == pytest.approx(0.85) and info.steps == 5
    assert info.learning_rate_integral == pytest.approx(5 * 0.85)


def test_a_rate_that_the_optimiser_keeps_to_itself_is_unknown(tmp_path, rng):
    from transformers.optimization import Adafactor

    model, batches = make_lora(), batches_of(rng, 12)
    optimizer = Adafactor(trained_parameters(model))
    found = snapshots_of(tmp_path, model, lambda _: train(model, batches, optimizer))
    for snapshot in found:
        info = snapshot.info
        assert (info.learning_rate, info.learning_rate_integral) == (None, None)
        assert gradient_error(snapshot, expected(snapshot, batches)) < bound("autograd")


def test_only_the_first_of_several_processes_writes(tmp_path, rng, monkeypatch):
    import mergeprobe_fast.record.probe as probe

    batches = batches_of(rng, 12)
    for rank in (1, 0):
        monkeypatch.setattr(probe, "processes", lambda rank=rank: (2, rank))
        model = make_lora()
        with mpf.record.record(model, tmp_path / "run", total_steps=12, fractions=EACH) as one:
            assert one.recording == (rank == 0)
            train(model, batches, sgd(model), clip=0.01)
        assert (tmp_path / "run").exists() == (rank == 0)
    for snapshot in open_run(tmp_path / "run").snapshots:
        at = expected(snapshot, batches)
        norm = np.sqrt(sum((x**2).sum() for part in (at.a, at.b) for x in part.values()))
        clipped = {n: x * 0.01 / norm for n, x in at.b.items()}
        assert error(last(snapshot)[1], clipped) < 2 * bound("autograd") + 1e-6 / norm
        assert snapshot.info.clip is None and "2 processes: gradients" in snapshot.info.notes[0]


def test_a_module_without_gradient_counts_as_zeros_and_is_noted(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)
    name = "model.layers.1.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    plain = layer.base_layer
    layer.forward = lambda x: plain(x)
    found = snapshots_of(tmp_path, model, lambda _: train(model, batches, sgd(model)))
    for snapshot in found:
        snapshot.check()
        assert not any(g.any() for which in ("last", "mean")
                       for g in snapshot.gradients(name, which))  # fmt: skip
        assert snapshot.info.notes[0].startswith(f"{name} had no gradient in a step")
        assert snapshot.info.clip.last == 1


def test_values_clipped_one_by_one_are_noted_and_undone(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)
    optimizer = sgd(model)
    real = optimizer.step

    def step():
        torch.nn.utils.clip_grad_value_(trained_parameters(model), 1e-3)
        real()

    optimizer.step = step
    found = snapshots_of(tmp_path, model, lambda _: train(model, batches, optimizer))
    for snapshot in found:
        assert gradient_error(snapshot, expected(snapshot, batches)) < bound("autograd")
        assert snapshot.info.clip is None
        assert "more than a common factor" in snapshot.info.notes[0]


def test_the_loss_may_be_given(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 24)
    base = model.get_base_model()

    def fit(probe):
        optimizer = sgd(model)
        for i in range(0, 24, 2):
            for batch in batches[i : i + 2]:
                logits = model(batch["input_ids"]).logits  # no loss comes out of the model
                loss = base.loss_function(logits, batch["labels"], base.config.vocab_size)
                (loss / 2).backward()
                probe.loss(loss)
            optimizer.step()
            optimizer.zero_grad()

    for snapshot in snapshots_of(tmp_path, model, fit):
        at = expected(snapshot, batches, 2)
        assert snapshot.info.loss.last == pytest.approx(at.loss, rel=1e-5)
        assert snapshot.info.notes == ()

    def late(probe):
        optimizer = sgd(model)
        for batch in batches:
            loss = model(batch["input_ids"]).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.loss(loss)

    found = snapshots_of(tmp_path / "late", model, late, overwrite=True)
    assert found[1].info.loss is None and "not recorded" in found[1].info.notes[-1]


def test_no_memory_beyond_two_copies(tmp_path, rng):
    model = make_lora()
    size = sum(p.numel() for p in trained_parameters(model)) * 4
    from mergeprobe_fast.record.probe import Recorder

    recorder = Recorder(model, tmp_path / "run", total_steps=12, fractions=(0.5,))
    held = [*recorder._backward.flat, *recorder._window._flat]
    assert sum(x.untyped_storage().nbytes() for x in held) == 2 * size
    for view in recorder._backward.raw:
        assert view.untyped_storage().data_ptr() == recorder._backward.flat[0].data_ptr()
    recorder.close()
    assert not any(p._post_accumulate_grad_hooks for p in trained_parameters(model))
    assert not model._forward_hooks


def test_another_models_optimiser_is_not_taken_for_ours(tmp_path, rng):
    model, other, batches = make_lora(), torch.nn.Linear(2, 2), batches_of(rng, 12)
    theirs = torch.optim.SGD(other.parameters(), lr=1.0)

    def before(_):
        other(torch.ones(2)).sum().backward()
        theirs.step()

    found = snapshots_of(
        tmp_path, model, lambda _: train(model, batches, sgd(model), before=before)
    )
    assert [s.steps for s in found] == [1, 2, 3, 4, 5]
    assert gradient_error(found[3], expected(found[3], batches)) < bound("autograd")


def test_a_plain_loop_resumes_where_it_said_it_may(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)
    arguments = {"total_steps": 12, "fractions": (3 / 12, 6 / 12), "name": "mine"}
    optimizer = sgd(model)
    with mpf.record.record(model, tmp_path / "run", **arguments) as probe:
        train(model, batches[:4], optimizer)
        probe.saved()
    with mpf.record.record(model, tmp_path / "run", start_step=4, **arguments) as probe:
        assert probe.recording
        train(model, batches[4:], optimizer)
        assert not probe.recording
    run = open_run(tmp_path / "run")
    assert [s.steps for s in run.snapshots] == [3, 6] and run.name == "mine"
    for snapshot in run.snapshots:
        assert gradient_error(snapshot, expected(snapshot, batches)) < bound("autograd")
    assert run.snapshots[1].info.learning_rate_integral == pytest.approx(3.0)
    assert run.snapshots[1].info.window == 3


def test_gauge_moves_gradients_as_it_must(tmp_path, rng):
    """A -> M A, B -> B M^-1: dA -> M^-T dA, dB -> dB M^T; <dA, A> and the visible part stay."""
    values = []
    batches = batches_of(rng, 12)
    m = rng.standard_normal((3, 3)) + 3 * np.eye(3)
    for gauge in (np.eye(3), m):
        model = make_lora()
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in model.modules():
                if hasattr(layer, "get_delta_weight"):
                    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    b.normal_(0, 0.1)
                    a.copy_(torch.from_numpy(gauge) @ a.double())
                    b.copy_(b.double() @ torch.from_numpy(np.linalg.inv(gauge)))
        found = snapshots_of(
            tmp_path / str(len(values)), model,
            lambda _, model=model: train(model, batches[:3], sgd(model, lr=0.0)),
            fractions=(1 / 12,),
        )  # fmt: skip
        a, b = last(found[0])
        values.append((a, b, found[0].values("euler_a"), found[0].values("visible_square")))
    (a, b, euler, visible), (moved_a, moved_b, moved_euler, moved_visible) = values
    limit = bound("autograd") * 3 * np.linalg.cond(m)
    assert error({n: m.T @ x for n, x in moved_a.items()}, a) < limit
    assert error({n: x @ np.linalg.inv(m).T for n, x in moved_b.items()}, b) < limit
    assert error(moved_a, a) > 100 * limit
    for n in visible:
        assert moved_visible[n] == pytest.approx(visible[n], rel=limit)
        assert abs(moved_euler[n] - euler[n]) < limit * visible[n] ** 0.5 * 10
