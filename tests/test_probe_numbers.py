"""The arithmetic of the recorder: planned steps, traces of solves, clip factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mergeprobe_fast as mpf
from mergeprobe_fast.record.probe_plan import FRACTIONS, check_fractions, planned_steps

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from mergeprobe_fast.record.probe_backward import clip_factor  # noqa: E402
from mergeprobe_fast.record.probe_window import trace_of_solve  # noqa: E402


@given(st.integers(2, 10**7), st.data())
def test_a_fraction_of_whole_steps_is_that_many(total, data):
    steps = data.draw(st.integers(1, total - 1))
    assert planned_steps((steps / total,), total) == (steps,)
    if steps < total - 1:
        assert planned_steps(((steps + 0.5) / total,), total) == (steps + 1,)


def test_default_fractions():
    assert planned_steps(FRACTIONS, 1000) == (10, 20, 50, 100)
    assert planned_steps(FRACTIONS, 12) == (1, 1, 1, 2)
    assert planned_steps((0.07,), 100) == (7,)
    for bad in ((), (0.0, 0.5), (0.5, 0.5), (-0.1,), (float("nan"),), ("x",), 0.5):
        with pytest.raises(mpf.InputError, match="fractions: expected"):
            check_fractions(bad)


def factors_of(rng, kind, r=4, d=9):
    a = rng.standard_normal((r, d))
    if kind == "duplicate rows":
        a[1] = a[0]
    elif kind == "zero":
        a[:] = 0
    elif kind == "ill conditioned":
        a = np.diag([1, 1e-2, 1e-3, 1e-4]) @ np.linalg.qr(a.T)[0].T
    return {"tiny": 1e-20, "huge": 1e15}.get(kind, 1.0) * a


KINDS = ["plain", "duplicate rows", "zero", "ill conditioned", "tiny", "huge"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_visible_part_is_the_projection(rng, kind):
    """tr((A A^T)^+ dB^T dB) = ||G P_A||^2 for dB = G A^T, by a dense projector."""
    others = [factors_of(rng, "plain") for _ in range(2)]
    stack = [others[0], factors_of(rng, kind), others[1]]
    full = [rng.standard_normal((7, 9)) for _ in stack]
    gradients = [g @ a.T for g, a in zip(full, stack, strict=True)]
    found = trace_of_solve(
        np.stack([a @ a.T for a in stack]), np.stack([db.T @ db for db in gradients])
    )
    for value, a, g in zip(found, stack, full, strict=True):
        onto = np.linalg.pinv(a) @ a if a.any() else np.zeros((9, 9))
        assert value == pytest.approx(((g @ onto) ** 2).sum(), rel=1e-6, abs=0)


def test_what_is_not_finite_stays_so(rng):
    good = np.eye(3)
    bad = np.full((3, 3), np.nan)
    found = trace_of_solve(np.stack([good, bad, good]), np.stack([good, good, bad]))
    assert found[0] == pytest.approx(3) and np.isnan(found[1:]).all()


def parameters(rng, dtype=torch.float32, factor=1.0):
    found, raw = [], []
    for shape in ((3, 5), (7, 3)):
        kept = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = kept * factor
        found.append(parameter)
        raw.append(kept.float())
    return found, raw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0314])
def test_clip_factors_are_found_through_the_rounding_of_gradients(rng, dtype, factor):
    found, raw = parameters(rng, dtype, factor)
    eps = torch.finfo(dtype).eps
    near = pytest.approx(factor, rel=max(eps, 1e-6))
    assert clip_factor(found, raw, 1.0) == near
    assert clip_factor(found, [x / 2 for x in raw], 2.0) == near
    if factor == 1.0:
        assert clip_factor(found, raw, 1.0) == 1.0


def test_other_changes_have_no_factor(rng):
    found, raw = parameters(rng)
    found[1].grad *= 0.5
    assert clip_factor(found, raw, 1.0) is None
    found, raw = parameters(rng, factor=2.0)
    assert clip_factor(found, raw, 1.0) is None
    found, raw = parameters(rng, factor=-1.0)
    assert clip_factor(found, raw, 1.0) is None
    found, raw = parameters(rng)
    raw[0][0, 0] = torch.inf
    assert clip_factor(found, raw, 1.0) is None
    found, raw = parameters(rng, factor=0.0)
    assert clip_factor(found, [x * 0 for x in raw], 1.0) == 1.0
    for parameter in found:
        parameter.grad = None
    assert clip_factor(found, raw, 1.0) == 1.0
