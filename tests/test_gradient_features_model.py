"""What gradient features say of the loss, against finite differences of a model in float64."""

from __future__ import annotations

import numpy as np
import torch
from adapters import make_adapter
from tiny_bases import draw_sequences, make_base, make_tokenizer, widened, write_ids
from tolerances import LAMBDA

import mergeprobe_fast as mpf
from mergeprobe_fast.features.gradients import FAMILY
from mergeprobe_fast.record import calibrate
from mergeprobe_fast.recorded import Recorded

SIZES = {
    "model.layers.0.self_attn.q_proj": (16, 16, 2),
    "model.layers.1.self_attn.v_proj": (8, 16, 3),
    "model.layers.2.mlp.down_proj": (16, 24, 1),
}
LATER = dict(list(SIZES.items())[1:])
LENGTHS = {"code": (7, 3, 11), "math": (9, 4)}
STEP = 1e-4


def total_loss(model, sequences):
    """Sum of -log p(next token) over all texts."""
    total = 0.0
    with torch.no_grad():
        for ids in sequences:
            tokens = torch.from_numpy(np.asarray(ids, np.int64))
            p = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
            total -= float(p[:-1].gather(1, tokens[1:, None]).sum())
    return total


def derivative(model, adapter, sequences):
    """Central difference of the loss along an adapter's delta."""
    losses = []
    for step in (STEP, -2 * STEP, STEP):
        with torch.no_grad():
            for name, m in adapter.modules.items():
                model.get_submodule(name).weight += step * torch.from_numpy(m.delta)
        losses.append(total_loss(model, sequences))
    return (losses[0] - losses[1]) / (2 * STEP)


def rounding(calibration, domain, adapter):
    """Of the mean of y^T W x: what rounding each x and y to BF16, by 2^-8 at most, leaves of it.

    Roundings are independent, so their squares add up.
    """
    squares = 0.0
    for name, m in adapter.modules.items():
        x, y = calibration.inputs(domain, name), calibration.gradients(domain, name)
        squares += np.square(x * (y @ m.delta)).sum() + np.square(y * (x @ m.delta.T)).sum()
    return LAMBDA * 2.0**-8 * np.sqrt(squares) / len(x)


def test_first_order_is_the_derivative_of_the_loss_per_token(tmp_path, rng):
    model = widened(make_base(tmp_path / "base"))
    made = [
        make_adapter(tmp_path / f"zoo/{i}", sizes, dtype=dtype, seed=int(rng.integers(1 << 30)))
        for i, (sizes, dtype) in enumerate(((SIZES, "F32"), (LATER, "BF16"), (SIZES, "F16")))
    ]
    texts = {d: draw_sequences(rng, lengths) for d, lengths in LENGTHS.items()}
    data = {d: write_ids(tmp_path / f"{d}.jsonl", rows) for d, rows in texts.items()}
    calibration = calibrate(
        model, data, tmp_path / "cal", tokenizer=make_tokenizer(), samples=99, skip_first=0,
        gradients=True, labels="data", modules=list(SIZES),
    )  # fmt: skip
    own = ("code", "math", "math")
    result = FAMILY.compute(mpf.open_zoo(tmp_path / "zoo"), Recorded(calibration, own), 1)
    column = next(c for c in FAMILY.pairs if c.name == "first_order_sampled_base_a_by_b")
    victim, partner = (x.ravel() for x in np.indices((3, 3)))
    ours = column.finish(result, victim, partner)
    slopes = [
        derivative(model, made[b], texts[own[a]]) / sum(LENGTHS[own[a]])
        for a, b in zip(victim, partner, strict=True)
    ]
    allowed = np.array(
        [rounding(calibration, own[a], made[b]) for a, b in zip(victim, partner, strict=True)]
    )
    assert (np.abs(ours - slopes) <= allowed).all()
    for wrong in (np.roll(slopes, 1), np.negative(slopes), np.multiply(slopes, 13 / 11)):
        assert (np.abs(ours - wrong) > allowed).any()
