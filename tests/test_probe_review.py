"""What a review of the recorder found: loops and trainings that real users write."""

from __future__ import annotations

import copy
import gc
import io
import logging
import tempfile

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch
from lora_training import (
    batches_of,
    draw_texts,
    gradient_error,
    make_lora,
    make_trainer,
    mean_of_losses,
    sgd,
    train,
    trained_parameters,
    truth,
)
from tolerances import bound
from torch.optim import optimizer as optimizers

import mergeprobe_fast as mpf
from mergeprobe_fast.io.probe import open_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT asks for it
    ),
]
EACH = tuple(s / 12 for s in range(1, 6))


def run_of(tmp_path, model, fit, **arguments):
    given = {"total_steps": 12, "fractions": EACH} | arguments
    with mpf.record.record(model, tmp_path / "run", **given) as probe:
        fit(probe)
    assert hooks_of(model) == 0
    return open_run(tmp_path / "run")


def hooks_of(model) -> int:
    """Everything that a recorder may have left on a model or for every optimiser."""
    globally = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    mine = sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters())
    return mine + sum(len(m._forward_hooks) for m in model.modules()) + sum(map(len, globally))


@pytest.mark.parametrize("given", [False, True])
def test_a_loss_that_is_divided_in_place_is_recorded_as_it_was(tmp_path, rng, given):
    model, batches, seen = make_lora(), batches_of(rng, 12), []

    def fit(probe):
        optimizer = sgd(model)
        for first in range(0, 12, 2):
            losses = []
            for batch in batches[first : first + 2]:
                loss = model(**batch).loss
                losses.append(loss.item())
                loss /= 2
                loss.backward()
                if given:
                    with torch.no_grad():
                        loss *= 2
                    probe.loss(loss)
                    with torch.no_grad():
                        loss.zero_()
            seen.append(np.mean(losses))
            optimizer.step()
            optimizer.zero_grad()

    for snapshot in run_of(tmp_path, model, fit).snapshots:
        assert snapshot.info.loss.last == pytest.approx(seen[snapshot.steps], rel=1e-6)
        step = batches[2 * snapshot.steps : 2 * snapshot.steps + 2]
        at = truth(snapshot, lambda m, step=step: mean_of_losses(m, step))
        assert gradient_error(snapshot, at) < bound("autograd")


def test_clipping_between_two_backward_passes_is_noted(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 12)

    def fit(probe):
        optimizer = sgd(model)
        for first in range(0, 12, 2):
            for batch in batches[first : first + 2]:
                (model(**batch).loss / 2).backward()
                torch.nn.utils.clip_grad_norm_(trained_parameters(model), 1e-3)
            optimizer.step()
            optimizer.zero_grad()

    for snapshot in run_of(tmp_path, model, fit).snapshots:
        assert "changed between two backward passes" in snapshot.info.notes[0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_is_no_change_between_backward_passes(tmp_path, rng, set_to_none):
    model = make_lora()

    def fit(probe):
        train(model, batches_of(rng, 12), sgd(model), accumulation=2, clip=1e-3,
              set_to_none=set_to_none)  # fmt: skip

    assert {s.info.notes for s in run_of(tmp_path, model, fit).snapshots} == {()}


def test_gradients_that_no_backward_left_are_noted(tmp_path, rng):
    model = make_lora()

    def fit(probe):
        parameters, optimizer = trained_parameters(model), sgd(model)
        for batch in batches_of(rng, 6):
            found = torch.autograd.grad(model(**batch).loss, parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()

    for snapshot in run_of(tmp_path, model, fit).snapshots:
        assert "came from elsewhere than backward" in snapshot.info.notes[0]


def test_a_model_can_be_saved_and_copied_while_it_is_recorded(tmp_path, rng):
    model, batches, file = make_lora(), batches_of(rng, 7), io.BytesIO()

    def fit(probe):
        optimizer = sgd(model)
        for i, batch in enumerate(batches[:6]):
            model(**batch).loss.backward()
            if i == 2:
                torch.save(model, file)
                other = copy.deepcopy(model)
                other(**batches[6]).loss.backward()  # its loss is not the recorded model's
            optimizer.step()
            optimizer.zero_grad()

    snapshot = run_of(tmp_path, model, fit).snapshots[1]
    at = truth(snapshot, lambda m: mean_of_losses(m, batches[2:3]))
    assert snapshot.info.loss.last == pytest.approx(at.loss, rel=1e-5)
    file.seek(0)
    assert torch.load(file, weights_only=False)(**batches[6]).loss.isfinite()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_forward_within_a_step_takes_no_hook_from_under_it(tmp_path, rng, given, before):
    model, batches = make_lora(), batches_of(rng, 9)
    optimizer = sgd(model)

    def evaluate(*_):
        model(**batches[0])

    if before:
        optimizer.register_step_post_hook(evaluate)

    def fit(probe):
        if not before:
            optimizer.register_step_post_hook(evaluate)
        train(model, batches, optimizer)
        assert hooks_of(model) == 0  # gone before the recorder is closed

    run = run_of(tmp_path, model, fit, optimizer=optimizer if given else None)
    assert len(run.snapshots) == 5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_a_model_that_is_compiled_is_recorded_until_the_last_snapshot(tmp_path, rng):
    model, batches = make_lora(), batches_of(rng, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    run = run_of(tmp_path, model, lambda probe: train(compiled, batches, sgd(model)))
    assert run.info.notes == () and len(run.snapshots) == 5
    for snapshot in run.snapshots:
        at = truth(snapshot, lambda m, i=snapshot.steps: mean_of_losses(m, batches[i : i + 1]))
        assert snapshot.info.loss.last == pytest.approx(at.loss, rel=1e-5)
        assert gradient_error(snapshot, at) < bound("autograd")


def test_saved_before_the_first_step_ends_nothing(tmp_path, rng):
    model = make_lora()

    def fit(probe):
        probe.saved()
        train(model, batches_of(rng, 6), sgd(model))

    run = run_of(tmp_path, model, fit)
    assert len(run.snapshots) == 5 and run.info.notes == ()


def test_factors_converted_in_the_middle_end_the_recording_with_a_readable_run(tmp_path, rng):
    model = make_lora()

    def fit(probe):
        train(model, batches_of(rng, 6), sgd(model),
              before=lambda i: model.to(torch.bfloat16) if i == 3 else None)  # fmt: skip

    run = run_of(tmp_path, model, fit)
    assert [s.steps for s in run.snapshots] == [1, 2]
    assert "was converted to torch.bfloat16 since recording began" in run.info.notes[0]


def test_a_temporary_folder_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with (
        pytest.raises(mpf.InputError, match=r"config cannot be written .*: No such file") as caught,
        mpf.record.record(make_lora(), tmp_path / "run", total_steps=12),
    ):
        pass
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_an_embedding_is_told_by_its_random_factor(tmp_path, rng):
    runs = []
    for at, seed in enumerate((0, 0, 1)):
        model = make_lora(seed, target_modules=["embed_tokens", "q_proj"])
        runs.append(run_of(tmp_path / str(at), model, lambda p, m=model: train(
            m, batches_of(rng, 2), sgd(m)), fractions=(1 / 12,)))  # fmt: skip
        assert runs[-1].snapshots[0].info.notes == ()  # B is not zero, but the update is
    one, same, other = (run.info.initial.modules for run in runs)
    assert one == same and all(one[name] != other[name] for name in one)


def trainer_of(tmp_path, texts, *others, **arguments):
    callback = mpf.record.ProbeCallback(tmp_path / "probe", fractions=(2 / 12, 4 / 12, 6 / 12))
    model = make_lora()
    trainer, _ = make_trainer(
        model, texts, tmp_path / "out", callback, *others, save_strategy="steps", save_steps=1,
        **arguments,
    )  # fmt: skip
    return trainer, model


class Stop(mpf.record.ProbeCallback.__base__):
    """Ends a training like a user who presses Ctrl-C."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_resume_from_before_a_snapshot_begins_a_window_where_it_is(tmp_path, rng):
    texts = draw_texts(rng, 80)
    trainer, _ = trainer_of(tmp_path, texts, Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    made = {p: p.stat().st_ino for p in (tmp_path / "probe").glob("step-*")}
    assert len(made) == 2
    trainer, model = trainer_of(tmp_path, texts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    run = open_run(tmp_path / "probe")
    assert [(s.steps, s.info.window) for s in run.snapshots] == [(2, 3), (4, 2), (6, 2)]
    assert all(p.stat().st_ino == inode for p, inode in made.items())
    assert hooks_of(model) == 0


def test_a_resume_from_the_end_has_nothing_to_record(tmp_path, rng):
    texts = draw_texts(rng, 80)
    trainer_of(tmp_path, texts)[0].train()
    before = open_run(tmp_path / "probe").info
    trainer, model = trainer_of(tmp_path, texts)
    trainer.train(resume_from_checkpoint=True)
    assert hooks_of(model) == 0
    assert open_run(tmp_path / "probe").info == before


def test_an_interrupted_trainer_takes_its_hooks_along(tmp_path, rng, caplog):
    trainer, model = trainer_of(tmp_path, draw_texts(rng, 80), Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert hooks_of(model) > 0  # nobody was told that the training is over
    with caplog.at_level(logging.WARNING):
        del trainer
        gc.collect()
    assert hooks_of(model) == 0
    assert open_run(tmp_path / "probe").info.notes == (
        "recording ended after 5 steps, before the snapshots after 6",
    )
