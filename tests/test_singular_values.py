"""Singular values of many small matrices, and the canonical forms of a zoo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import make_adapter
from small_cores import CASES, every_case
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.ops import reference, singular_values

SHAPES = [(1, 1), (1, 9), (7, 1), (3, 3), (8, 8), (5, 16), (16, 16), (20, 13), (32, 32), (40, 32),
          (6, 70), (33, 33), (50, 40)]  # fmt: skip


def kinds(rng, count, m, n):
    """Matrices of every kind, scaled to a largest singular value of 1 where it is not 0."""
    x = rng.standard_normal((count, m, n))
    few = min(m, n)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    sigma = np.ones((count, few))
    sigma[1::7] = np.geomspace(1, 1e-12, few)
    sigma[2::7] = rng.random((len(sigma[2::7]), few))
    sigma[3::7, few // 2 :] = 0
    sigma[4::7] = 0
    sigma[5::7] = 1 - 1e-9 * rng.random((len(sigma[5::7]), few))
    sigma[6::7, 1:] = 1e-5
    return (u * sigma[:, None, :]) @ vt


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values(rng, isa, shape, dtype):
    for count in (1, 41, 70):
        x = kinds(rng, count, *shape).astype(dtype)
        got = singular_values(x)
        want = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        assert got.dtype == np.float64 and got.shape == want.shape
        assert np.abs(got - want).max() < bound("singular values")
        assert (np.diff(got, axis=1) <= 0).all()
    np.testing.assert_array_equal(singular_values(torch.from_numpy(x)), got)
    np.testing.assert_array_equal(singular_values(x, threads=1), singular_values(x, threads=3))


def test_matrices_that_come_apart_earlier_than_others_in_their_group(rng, isa):
    """Of low rank among graded ones: a sweep for the others may couple what had come apart."""
    count, k = 60_000, 5
    x = rng.standard_normal((count, k, k))
    x *= (np.arange(k) < rng.integers(1, 4, (count, 1)))[..., None]
    graded = rng.random(count) < 0.25
    x[graded] *= 10.0 ** -rng.integers(0, 3, (int(graded.sum()), k))[..., None]
    x[rng.random(count) < 0.25] = 0
    want = np.linalg.svd(x, compute_uv=False)
    assert (np.abs(singular_values(x) - want) <= bound("singular values") * want[:, :1]).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_error_is_relative_to_the_largest(rng, size):
    x = rng.standard_normal((20, 6, 9)) * size
    want = np.linalg.svd(x, compute_uv=False)
    assert (np.abs(singular_values(x) - want) < bound("singular values") * want[:, :1]).all()


def test_the_bound_catches_float32(rng):
    x = kinds(rng, 70, 16, 16)
    want = np.linalg.svd(x, compute_uv=False)
    gram = np.einsum("bij,bik->bjk", *[x.astype(np.float32)] * 2)
    wrong = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[:, ::-1], 0))
    assert np.abs(wrong - want).max() > bound("singular values")


def test_nothing_to_do():
    for shape in ((0, 4, 3), (5, 0, 3), (5, 3, 0)):
        assert singular_values(np.zeros(shape)).shape == (shape[0], min(shape[1:]))


@pytest.mark.parametrize(("x", "text"), [
    (np.ones((2, 2)), "matrices: expected 3 dimensions, got 2"),
    (np.ones((1, 2, 2), int), "matrices: expected float32 or float64 arrays"),
    ([[[1.0]]], "matrices: expected float32 or float64 arrays"),
    (np.full((1, 2, 2), np.nan), "matrices: holds NaN or infinite values"),
])  # fmt: skip
def test_refusals(x, text):
    with pytest.raises(InputError) as error:
        singular_values(x)
    assert str(error.value) == text


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_canonical_forms_of_a_zoo(rng, tmp_path, isa, case, dtype):
    made = CASES[case](tmp_path, rng)
    zoo = mpf.open_zoo([m.path for m in made])
    seen = []
    for item in mpf.canonical(zoo, dtype=dtype):
        seen.append(item.module.name)
        have = {n: m for n, m in zip(zoo.names, made, strict=True) if item.module.name in m.modules}
        assert list(item.forms) == list(have)
        for name, form in item.forms.items():
            truth = have[name].modules[item.module.name]
            assert form.left.dtype == form.right.dtype == np.dtype(dtype)
            assert form.left.shape == (form.rank, item.module.d_out)
            rebuilt = form.left.T.astype(float) * form.sigma[: form.rank] @ form.right
            size = np.linalg.norm(truth.scale * truth.b) * np.linalg.norm(truth.a)
            slack = 1e-6 if dtype == "float32" else 1e-6 * (form.rank < len(form.sigma)) + 1e-12
            assert np.linalg.norm(rebuilt - truth.delta) <= slack * size
            want = reference.canonical([(truth.b, truth.a, truth.scale)])
            np.testing.assert_allclose(form.sigma, want.sigma, atol=10 * bound("sigma") * size)
            assert form.rank == want.rank
    assert seen == [m.name for m in zoo.modules]


def test_canonical_form_knows_its_words(tmp_path):
    make_adapter(tmp_path / "a")
    with pytest.raises(InputError, match="expected 'float32' or 'float64', got 'f4'"):
        mpf.canonical(mpf.open_zoo(tmp_path), dtype="f4")
