"""Linear layers of a frozen model through oneDNN: the same numbers, forward and backward."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mergeprobe_fast.merge_peft.model import linear  # noqa: E402

SHAPES = [(7, 5, 3), (1, 64, 32), (0, 8, 4), (33, 576, 192)]


@pytest.fixture
def sped_up(monkeypatch):
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("this torch has no such operator")
    monkeypatch.setattr(linear, "available", lambda: True)


def frozen(d_in, d_out, rng, bias=False):
    module = torch.nn.Linear(d_in, d_out, bias=bias)
    module.weight.data = torch.from_numpy(rng.standard_normal((d_out, d_in), np.float32))
    return module.requires_grad_(False)


def close(found, x, w):
    """Within the rounding of a float32 dot product of length d: d eps |x| |w|, both ways added."""
    x, w = x.detach().double(), w.double()
    bound = len(w) * np.finfo(np.float32).eps * (x.abs() @ w.abs())
    return bool(((found.double() - x @ w).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_outputs_and_gradients_are_those_of_float64(sped_up, rng, shape, lead):
    n, d_in, d_out = shape
    module = frozen(d_in, d_out, rng)
    linear.speed_up(module)
    x = torch.from_numpy(rng.standard_normal((*lead, n, d_in), np.float32)).requires_grad_()
    y = module(x)
    direction = torch.from_numpy(rng.standard_normal(y.shape).astype(np.float32))
    (y * direction).sum().backward()
    w = module.weight
    assert y.shape == (*lead, n, d_out)
    assert close(y.detach(), x, w.T)
    assert close(x.grad, direction, w)
    assert module.weight.grad is None
    if n > 1:  # products of bfloat16 would be seen
        assert not close(y.detach(), x.bfloat16(), w.T.bfloat16())


def test_a_weight_that_is_exchanged_counts_at_once(sped_up, rng):
    module = frozen(16, 8, rng)
    linear.speed_up(module)
    x = torch.from_numpy(rng.standard_normal((4, 16), np.float32))
    before = module(x)
    module.weight = torch.nn.Parameter(2 * module.weight, requires_grad=False)
    assert torch.equal(module(x), 2 * before)


def test_what_is_trained_biased_or_of_another_type_takes_the_usual_way(sped_up, rng):
    x = torch.from_numpy(rng.standard_normal((4, 16), np.float32))
    trained, biased, half = (frozen(16, 8, rng, bias=b) for b in (False, True, False))
    trained.requires_grad_(True)
    half.to(torch.bfloat16)
    for module, given in ((trained, x), (biased, x), (half, x.bfloat16())):
        plain = module(given)
        linear.speed_up(module)
        assert torch.equal(module(given), plain)
    trained(x).sum().backward()
    assert trained.weight.grad is not None


def test_a_copy_of_a_model_runs_on_its_own_weights(sped_up, rng):
    model = torch.nn.Sequential(frozen(16, 8, rng))
    linear.speed_up(model)
    twin = copy.deepcopy(model)
    x = torch.from_numpy(rng.standard_normal((4, 16), np.float32))
    twin[0].weight.data.zero_()
    assert not torch.equal(model(x), twin(x)) and not twin(x).any()


def test_an_older_processor_keeps_its_own_kernels(monkeypatch, rng):
    monkeypatch.setattr(linear, "available", lambda: False)
    module = frozen(16, 8, rng)
    linear.speed_up(module)
    assert "forward" not in vars(module)
