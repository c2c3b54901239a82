"""ProbeCallback in transformers' Trainer: what it records is what autograd says, and no more."""

from __future__ import annotations

import logging

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch
from lora_training import (
    draw_texts,
    error,
    factors,
    gradient_error,
    last,
    make_llama,
    make_lora,
    make_trainer,
    mean_loss,
    truth,
)
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.io.probe import open_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT asks for it
        "ignore:.gradient_checkpointing:FutureWarning",  # the name before transformers 5
    ),
]
EACH = tuple(s / 12 for s in range(1, 6))  # a snapshot after each of the first five of 12 steps


def run_of(tmp_path, rng, fractions=EACH, texts=None, model=None, **arguments):
    """Train with the callback; the opened run, the batches and the trainer."""
    texts = texts or draw_texts(rng, 80)
    callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=fractions)
    model = make_lora() if model is None else model
    trainer, batches = make_trainer(model, texts, tmp_path / "out", callback, **arguments)
    trainer.train()
    return open_run(tmp_path / "probe"), batches, trainer


def expected(snapshot, batches, accumulation=1, base=None):
    """The truth for the step after the snapshot."""
    first = snapshot.steps * accumulation
    step = batches[first : first + accumulation]
    return truth(snapshot, lambda model: mean_loss(model, step), base)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_gradients_are_those_of_autograd_neither_clipped_nor_scaled(
    tmp_path, rng, accumulation, max_grad_norm
):
    run, batches, trainer = run_of(
        tmp_path, rng, gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm
    )
    assert [s.steps for s in run.snapshots] == [1, 2, 3, 4, 5]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    rates = [logged[i + 1]["learning_rate"] for i in range(6)]
    for snapshot in run.snapshots:
        snapshot.check()
        s, info = snapshot.steps, snapshot.info
        at = expected(snapshot, batches, accumulation)
        assert gradient_error(snapshot, at) < bound("autograd")
        assert info.loss.last == pytest.approx(at.loss, rel=1e-5)
        assert info.loss.last == pytest.approx(logged[s + 1]["loss"], rel=1e-6)
        assert info.micro_batches == accumulation
        assert info.window == (2 if s == 1 else 1)
        norm = np.sqrt(sum((x**2).sum() for part in (at.a, at.b) for x in part.values()))
        clipped = max_grad_norm / (norm + 1e-6) if max_grad_norm else 1.0
        assert info.clip.last == pytest.approx(clipped, rel=1e-4)
        assert (clipped < 1) == bool(max_grad_norm)
        assert info.learning_rate == pytest.approx(rates[s - 1], rel=1e-9)
        assert info.learning_rate_integral == pytest.approx(sum(rates[:s]), rel=1e-9)
        assert info.loss_scale is None and info.learning_rate_groups is None
        assert (info.optimizer, info.dtype, info.notes) == ("AdamW", "F32", ())
    # Faults that would go unseen by a looser bound: another step, clipped, no accumulation.
    snapshot, other = run.snapshots[1], run.snapshots[2]
    right = expected(snapshot, batches, accumulation)
    assert gradient_error(other, right) > 100 * bound("autograd")
    if accumulation == 3:
        assert gradient_error(snapshot, expected(snapshot, batches)) > 100 * bound("autograd")


def test_means_are_over_the_window_each_step_at_its_own_factors(tmp_path, rng):
    texts = draw_texts(rng, 80)
    each, batches, _ = run_of(tmp_path / "each", rng, texts=texts)
    whole, again, _ = run_of(tmp_path / "whole", rng, (5 / 12,), texts)
    assert all(torch.equal(x["labels"], y["labels"]) for x, y in zip(batches, again, strict=True))
    (snapshot,) = whole.snapshots
    assert (snapshot.steps, snapshot.info.window, snapshot.info.loss.count) == (5, 6, 6)
    first_mean, first_last = last(each.snapshots[0], "mean"), last(each.snapshots[0])
    for i in (0, 1):
        found, total = last(snapshot, "mean")[i], {}
        for module in found:
            # The first snapshot's window is the steps 1 and 2.
            first = 2 * first_mean[i][module] - first_last[i][module]
            total[module] = (first + sum(last(s)[i][module] for s in each.snapshots)) / 6
        assert error(found, total) < bound("autograd")
        assert error(last(snapshot)[i], total) > 100 * bound("autograd")
    losses = [2 * each.snapshots[0].info.loss.mean - each.snapshots[0].info.loss.last]
    losses += [s.info.loss.last for s in each.snapshots]
    assert snapshot.info.loss.mean == pytest.approx(np.mean(losses), rel=1e-6)


def test_products_with_the_factors_are_the_full_gradients(tmp_path, rng):
    run, batches, _ = run_of(tmp_path, rng)
    for snapshot in run.snapshots[1:]:  # of one step each
        at = expected(snapshot, batches)
        values = {k: snapshot.values(k) for k in ("euler_a", "euler_b", "visible_square")}
        for module, gradient in at.full.items():
            size = np.linalg.norm(gradient) * np.linalg.norm(at.delta[module])
            inner = float((gradient * at.delta[module]).sum())
            onto = np.linalg.pinv(at.factor_a[module]) @ at.factor_a[module]
            visible = float(((gradient @ onto) ** 2).sum())
            assert abs(values["euler_a"][module] - inner) < bound("autograd") * size
            assert abs(values["euler_b"][module] - inner) < bound("autograd") * size
            assert values["visible_square"][module] == pytest.approx(
                visible, rel=2 * bound("autograd")
            )
            # Planted: without the projection.
            assert abs((gradient**2).sum() - visible) > 100 * bound("autograd") * visible


@pytest.mark.parametrize("how", ["plain", "accumulated", "bf16", "checkpointed"])
def test_training_is_the_same_to_the_bit(tmp_path, rng, how):
    arguments = {
        "plain": {}, "accumulated": {"gradient_accumulation_steps": 3, "max_grad_norm": 1e-3},
        "bf16": {"bf16": True}, "checkpointed": {"gradient_checkpointing": True},
    }[how]  # fmt: skip
    texts, models = draw_texts(rng, 80), [make_lora(), make_lora()]
    if how == "checkpointed":
        for model in models:
            model.enable_input_require_grads()
    run_of(tmp_path, rng, texts=texts, model=models[0], **arguments)
    trainer, _ = make_trainer(models[1], texts, tmp_path / "without", **arguments)
    trainer.train()
    one, other = map(factors, models)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_bf16_autocast_is_recorded_with_the_rounding_it_has(tmp_path, rng):
    run, batches, _ = run_of(tmp_path, rng, bf16=True)
    for snapshot in run.snapshots:
        snapshot.check()
        assert snapshot.info.dtype == "F32"
        assert gradient_error(snapshot, expected(snapshot, batches)) < bound("autograd bf16")
    wrong = expected(run.snapshots[1], batches)
    assert gradient_error(run.snapshots[3], wrong) > 3 * bound("autograd bf16")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, rng, reentrant):
    model = make_lora()
    model.enable_input_require_grads()
    run, batches, _ = run_of(
        tmp_path, rng, model=model, gradient_checkpointing=True, gradient_accumulation_steps=2,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    for snapshot in run.snapshots:
        at = expected(snapshot, batches, 2)
        assert gradient_error(snapshot, at) < bound("autograd")
        assert snapshot.info.micro_batches == 2
        assert snapshot.info.loss.last == pytest.approx(at.loss, rel=1e-5)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused"])
def test_other_optimisers(tmp_path, rng, optim):
    run, batches, _ = run_of(tmp_path, rng, optim=optim, max_grad_norm=0.01)
    names = {"sgd": "SGD", "adafactor": "Adafactor", "adamw_torch_fused": "AdamW"}
    for snapshot in run.snapshots:
        at = expected(snapshot, batches)
        if optim != "sgd" or snapshot.steps > 1:
            assert gradient_error(snapshot, at) < bound("autograd")
        assert snapshot.info.optimizer == names[optim]
        assert snapshot.info.clip.last < 1


def test_factors_in_bfloat16_are_kept_bit_by_bit(tmp_path, rng):
    model = make_lora(dtype=torch.bfloat16)
    texts = draw_texts(rng, 80)
    run, batches, _ = run_of(tmp_path, rng, texts=texts, model=model)
    assert {s.info.dtype for s in run.snapshots} == {"BF16"}
    base = make_llama(dtype=torch.bfloat16)
    snapshot = run.snapshots[2]
    snapshot.check()
    assert gradient_error(snapshot, expected(snapshot, batches, base=base)) < bound("autograd bf16")


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_training_continues_its_run(tmp_path, rng, stop):
    texts = draw_texts(rng, 80)
    fractions = (2 / 12, 4 / 12, 6 / 12)
    whole, _, _ = run_of(tmp_path / "whole", rng, fractions, texts)

    def begin():
        callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=fractions)
        trainer, _ = make_trainer(
            make_lora(), texts, tmp_path / "out", callback, save_strategy="steps", save_steps=1
        )
        return trainer

    class Killed(Exception):
        pass

    class Kill(mpf.record.ProbeCallback.__base__):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == stop:
                raise Killed

    trainer = begin()
    trainer.add_callback(Kill())
    with pytest.raises(Killed):
        trainer.train()
    made = {p: (p / "probe.json").read_bytes() for p in (tmp_path / "probe").glob("step-*")}
    assert len(made) == (1 if stop == 3 else 2)
    trainer = begin()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stop}"))
    assert all((p / "probe.json").read_bytes() == data for p, data in made.items())
    run = open_run(tmp_path / "probe")
    assert run.info.initial == whole.info.initial
    for one, other in zip(whole.snapshots, run.snapshots, strict=True):
        assert one.steps == other.steps
        for module in one.info.modules:
            for x, y in zip(one.factors(module), other.factors(module), strict=True):
                np.testing.assert_array_equal(x, y)
            for x, y in zip(one.gradients(module, "last"), other.gradients(module, "last"),
                            strict=True):  # fmt: skip
                np.testing.assert_array_equal(x, y)
        assert one.info.learning_rate_integral == pytest.approx(
            other.info.learning_rate_integral, rel=1e-12
        )
    resumed = run.snapshots[-1].info
    assert resumed.window == (6 - stop + 1 if stop == 5 else 2)
    assert resumed.initial == whole.info.initial and resumed.notes == ()


def test_a_resume_without_its_run_says_what_is_unknown(tmp_path, rng):
    texts = draw_texts(rng, 80)
    trainer, _ = make_trainer(
        make_lora(), texts, tmp_path / "out", save_strategy="steps", save_steps=3
    )
    trainer.train()
    callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=EACH)
    trainer, _ = make_trainer(make_lora(), texts, tmp_path / "out", callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    run = open_run(tmp_path / "probe")
    assert [s.steps for s in run.snapshots] == [3, 4, 5]
    assert run.info.initial is None and "initial factors are unknown" in run.info.notes[0]
    first, second = (s.info for s in run.snapshots[:2])
    assert (first.learning_rate, first.learning_rate_integral) == (None, None)
    assert first.window == 1 and first.initial is None
    assert second.learning_rate > 0 and second.learning_rate_integral is None


def test_a_resume_into_another_run_is_refused(tmp_path, rng):
    texts = draw_texts(rng, 80)
    trainer, _ = make_trainer(
        make_lora(), texts, tmp_path / "out", mpf.record.ProbeCallback(tmp_path / "probe",
        fractions=EACH), save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=(0.5,))
    trainer, _ = make_trainer(make_lora(), texts, tmp_path / "out", callback)
    with pytest.raises(mpf.InputError, match=r"run\.json: fractions: is \(0\.08"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


def test_a_second_training_does_not_replace_the_first(tmp_path, rng):
    run, _, trainer = run_of(tmp_path, rng)
    with pytest.raises(mpf.InputError, match="exists; pass overwrite=True to replace a run"):
        trainer.train()
    assert open_run(tmp_path / "probe").info == run.info


def test_training_that_ends_early_is_noted(tmp_path, rng, caplog):
    class Stop(mpf.record.ProbeCallback.__base__):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=EACH)
    trainer, _ = make_trainer(make_lora(), draw_texts(rng, 9), tmp_path / "o", callback, Stop())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    run = open_run(tmp_path / "probe")
    assert [s.steps for s in run.snapshots] == [1, 2]
    said = "recording ended after 3 steps, before the snapshots after 3, 4, 5"
    assert run.info.notes == (said,)
    assert [r.getMessage() for r in caplog.records if said in r.getMessage()]


def test_no_hook_is_left_after_the_last_snapshot(tmp_path, rng):
    left = {}

    class Look(mpf.record.ProbeCallback.__base__):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            parameters = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
            steps = optimizer.optimizer._optimizer_step_pre_hooks
            left[state.global_step] = len(parameters), len(model._forward_hooks), len(steps)

    callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=(2 / 12,))
    trainer, _ = make_trainer(make_lora(), draw_texts(rng, 9), tmp_path / "o", callback, Look())
    trainer.train()
    assert left[1] == left[2] == (12, 1, 1)
    assert left[3][0] == 0 and left[4] == left[12] == (0, 0, 0)
