"""What record() refuses before a training, and what ends a recording but never a training."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from lora_training import batches_of, make_llama, make_lora, sgd, train, trained_parameters

import mergeprobe_fast as mpf
from mergeprobe_fast.io.probe import open_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT asks for it
)
EACH = tuple(s / 12 for s in range(1, 6))


def snapshots_of(tmp_path, model, fit, **arguments):
    given = {"total_steps": 12, "fractions": EACH} | arguments
    with mpf.record.record(model, tmp_path / "run", **given) as probe:
        fit(probe)
    return open_run(tmp_path / "run").snapshots


REFUSED = [
    ({"use_dora": True}, {}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    ({"bias": "all"}, {}, "bias"),
    ({"lora_alpha": 0}, {}, "its scale is 0"),
    ({}, {"fractions": ()}, "fractions: expected ascending numbers between 0 and 1"),
    ({}, {"fractions": (0.2, 0.1)}, "fractions: expected ascending"),
    ({}, {"fractions": (0.5, 1.0)}, "fractions: expected ascending"),
    ({}, {"fractions": (0.99,)}, "0.99 of 12 steps leave no step"),
    ({}, {"total_steps": 0}, "total_steps: expected an integer from 1"),
    ({}, {"start_step": 12}, "start_step: expected an integer from 0 to 11"),
    ({}, {"name": ""}, "name: is not a text"),
]


@pytest.mark.parametrize(("config", "arguments", "reason"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_cannot_be_recorded_is_refused_before_the_training(
    tmp_path, config, arguments, reason
):
    given = {"total_steps": 12, "fractions": EACH} | arguments
    with (
        pytest.raises(mpf.InputError, match=reason),
        mpf.record.record(make_lora(**config), tmp_path / "run", **given),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_frozen_shared_and_foreign_models_are_refused(tmp_path):
    def refused(model, reason, **arguments):
        given = {"total_steps": 12, "fractions": EACH} | arguments
        with (
            pytest.raises(mpf.InputError, match=reason),
            mpf.record.record(model, tmp_path / "run", **given),
        ):
            pass
        assert not (tmp_path / "run").exists()

    refused(make_llama(), "expected a PEFT model with LoRA adapters, got LlamaForCausalLM")
    model = make_lora()
    model.base_model.set_requires_grad("default", False)
    refused(model, "q_proj: its A is frozen")
    model = make_lora(target_modules=["q_proj"])
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    refused(model, "layers.1.self_attn.q_proj: shares its A with model.layers.0")
    model = make_lora()
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    layers[0].set_scale("default", 2.0)
    refused(model, "has rank 3 and scale 5.33333, but its config gives 3 and 2.66667")
    model = make_lora().double()
    refused(model, "its factors are float64; expected one of float32, bfloat16, float16")
    model = make_lora()
    refused(model, "optimizer: holds 1 of the 12 factors",
            optimizer=torch.optim.SGD(trained_parameters(model)[:1]))  # fmt: skip
    refused(model, "optimizer: object is no torch optimizer", optimizer=object())


def test_two_optimisers_and_closures_end_the_recording_not_the_training(tmp_path, rng, caplog):
    batches = batches_of(rng, 12)
    model = make_lora()
    half = trained_parameters(model)[::2]

    def halves(_):
        one = torch.optim.SGD(half, lr=0.1)
        for batch in batches:
            model(**batch).loss.backward()
            one.step()
            one.zero_grad()

    with caplog.at_level(logging.WARNING):
        assert snapshots_of(tmp_path / "half", model, halves) == ()
    (record,) = caplog.records
    assert "optimizer: holds 6 of the 12 factors" in record.getMessage()
    assert "holds 6 of the 12" in open_run(tmp_path / "half" / "run").info.notes[0]

    def closed(_):
        optimizer = sgd(model)
        for batch in batches:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                return loss

            optimizer.step(closure)

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert snapshots_of(tmp_path / "closure", model, closed) == ()
    assert "a closure computes the gradients" in caplog.records[0].getMessage()
    assert not any(p._post_accumulate_grad_hooks for p in trained_parameters(model))


def test_a_trainer_that_begins_again_with_smaller_batches_replaces_its_own_run(tmp_path):
    model = make_lora()
    state = SimpleNamespace(max_steps=12, global_step=0)
    args = SimpleNamespace(auto_find_batch_size=True)
    callback = mpf.record.ProbeCallback(tmp_path / "run", fractions=EACH)
    for _ in range(2):
        callback.on_train_begin(args, state, None, model=model, optimizer=sgd(model))
    again = mpf.record.ProbeCallback(tmp_path / "run", fractions=EACH)
    with pytest.raises(mpf.InputError, match="exists; pass overwrite=True"):
        again.on_train_begin(args, state, None, model=model, optimizer=sgd(model))
    for key in ("deepspeed", "fsdp"):
        args = SimpleNamespace(**{"auto_find_batch_size": False, key: "yes"})
        with pytest.raises(mpf.InputError, match=f"{key}: gradients are sharded"):
            again.on_train_begin(args, state, None, model=model, optimizer=sgd(model))
    callback.on_train_end(args, state, None)
    assert not any(p._post_accumulate_grad_hooks for p in trained_parameters(model))


def test_a_resume_into_an_empty_folder_begins_there(tmp_path, rng):
    (tmp_path / "run").mkdir()
    model, batches = make_lora(), batches_of(rng, 9)
    found = snapshots_of(tmp_path, model, lambda _: train(model, batches, sgd(model)), start_step=3)
    assert [s.steps for s in found] == [3, 4, 5]
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(mpf.InputError, match=r"has no run\.json: not a probe run"):
        snapshots_of(tmp_path, model, None, start_step=3)
