"""TSV-M and Iso-C, defined by numerical rank, against SVDs of materialised deltas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from adapters import make_adapter
from dense_merge import WIDE, assert_peft_agrees, merge_json, truncated
from small_cores import (
    CASES,
    delta,
    every_case,
    merged_deltas,
    rounding,
    true_deltas,
    turned,
)
from tolerances import TOLERANCES

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError

KEPT = 1e-6  # of the largest singular value: above the rounding of float32 deltas
BASIS = TOLERANCES["basis"].value
SHARED = 1e-4  # the methods' default tolerance


def triples(x: np.ndarray, relative: float = KEPT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    k = int(np.count_nonzero(s > relative * s[0])) if s[0] > 0 else 0
    return u[:, :k], s[:k], vt[:k].T


def polar(x: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > SHARED * s[0]
    return u[:, kept] @ vt[kept]


def dense_tsv(deltas: list[np.ndarray], keep: float = 1.0) -> np.ndarray:
    """Gargiulo et al., with the numerical rank of each delta instead of min(d_out, d_in) / N."""
    size = max(map(np.linalg.norm, deltas))
    parts = []
    for x in deltas:
        if np.linalg.norm(x) > 1e-12 * size:
            u, s, v = triples(x)
            k = math.ceil(keep * len(s) - 1e-9)
            parts.append((u[:, :k], s[:k], v[:, :k]))
    if not parts:
        return np.zeros_like(deltas[0])
    u, s, v = (np.concatenate(side, axis=-1) for side in zip(*parts, strict=True))
    return (polar(u) * s) @ polar(v).T


def dense_iso(total: np.ndarray) -> tuple[np.ndarray, int]:
    """Marczak et al., with the numerical rank of the sum."""
    u, s, v = triples(total, SHARED)
    return (u * (s.mean() if len(s) else 0.0)) @ v.T, len(s)



@pytest.mark.parametrize("weights", [None, (0.5, -1.2, 2.0), (1.0, 0.0, 1.0)])
@every_case
def test_tsv_m_is_its_definition(tmp_path, rng, case, weights):
    made = CASES[case](tmp_path, rng)
    got = merged_deltas(made, "tsv_m", weights=weights)
    w = weights or (1.0, 1.0, 1.0)
    for name, deltas in true_deltas(made).items():
        scaled = [x * d for x, d in zip(w, deltas, strict=True)]
        want = dense_tsv(scaled)
        # Singular vectors that [U_1 U_2 ...] nearly repeats are resolved to eps / gap; float64.
        bound = rounding(want, deltas, w) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound, name
        plain = sum(scaled)
        if min(want.shape) > 20 and np.count_nonzero([x.any() for x in scaled]) > 1:
            assert np.linalg.norm(delta(got[name]) - plain) > 100 * bound, "not the plain sum"


@pytest.mark.parametrize("weights", [None, (0.5, -1.2, 2.0)])
@every_case
def test_iso_c_is_its_definition(tmp_path, rng, case, weights):
    made = CASES[case](tmp_path, rng)
    got = merged_deltas(made, "iso_c", weights=weights)
    w = weights or (1.0, 1.0, 1.0)
    for name, deltas in true_deltas(made).items():
        total = sum(x * d for x, d in zip(w, deltas, strict=True))
        if np.linalg.norm(total) <= 1e-12 * sum(map(np.linalg.norm, deltas)):
            total = np.zeros_like(total)
        want, rank = dense_iso(total)
        spectrum = triples(total, SHARED)[1]
        gain = spectrum[0] / spectrum[-1] if rank else 1.0  # small directions are turned by more
        bound = rounding(want, deltas, w) * gain
        error = np.linalg.norm(delta(got[name]) - want)
        assert error <= bound, name
        assert got[name].rank_before == rank
        assert got[name].norm == pytest.approx(np.linalg.norm(want), rel=1e-6)
        if rank > 1 and spectrum[0] > 1.01 * spectrum[-1]:
            assert np.linalg.norm(delta(got[name]) - want * 1.001) > error
        if rank and rank < min(want.shape):
            over_all = want * rank / min(want.shape)  # the published mean over min(d_out, d_in)
            assert np.linalg.norm(delta(got[name]) - over_all) > bound


def test_duplicates_count_once_in_tsv_m(tmp_path, rng):
    one = make_adapter(tmp_path / "one", WIDE, seed=int(rng.integers(1 << 30)))
    two = turned(one, tmp_path / "two", rng)
    got = merged_deltas([one, two], "tsv_m")
    for name, deltas in true_deltas([one, two]).items():
        moved = np.linalg.norm(deltas[0] - deltas[1])
        bound = rounding(deltas[0], deltas, (1, 1)) + 2 * moved
        assert np.linalg.norm(delta(got[name]) - deltas[0]) <= bound
        assert bound < 1e-5 * np.linalg.norm(deltas[0])
        assert got[name].details == {"shared_left": 4 if name != "head" else 3,
                                     "shared_right": 4 if name != "head" else 3}  # fmt: skip


def test_tsv_m_of_one_adapter_or_of_orthogonal_ones_is_the_sum(tmp_path, rng):
    basis_out, basis_in = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (30, 25))
    made = []
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        factors = {"m": (rng.standard_normal((4, 4)) @ basis_in[part],
                         basis_out[:, part] @ rng.standard_normal((4, 4)))}  # fmt: skip
        made.append(make_adapter(tmp_path / f"{i}", {"m": (30, 25, 4)}, factors=factors))
    for some in (made, made[:1]):
        got = merged_deltas(some, "tsv_m")
        deltas = true_deltas(some)["m"]
        bound = rounding(sum(deltas), deltas, (1, 1, 1)[: len(some)])
        # float32 factors are orthogonal to 1e-7, times the spread of each spectrum
        spread = max(triples(d)[1][0] / triples(d)[1][-1] for d in deltas)
        slack = 1e-6 * spread * np.linalg.norm(sum(deltas)) if len(some) > 1 else 0.0
        assert np.linalg.norm(delta(got["m"]) - sum(deltas)) <= bound + slack


@pytest.mark.parametrize("keep", [0.4, 0.75])
def test_tsv_m_keeps_the_leading_share(tmp_path, rng, keep):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    got = merged_deltas(made, "tsv_m", keep=keep)
    for name, deltas in true_deltas(made).items():
        want = dense_tsv(deltas, keep)
        bound = rounding(want, deltas, (1, 1, 1)) + BASIS * np.linalg.norm(want)
        assert np.linalg.norm(delta(got[name]) - want) <= bound
        assert np.linalg.norm(delta(got[name]) - dense_tsv(deltas)) > 100 * bound


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_neither_the_gauge_nor_the_order_matters(tmp_path, rng, method):
    made = CASES["modules missing"](tmp_path, rng)
    other = [turned(a, tmp_path / f"turned{i}", rng) for i, a in enumerate(made)]
    w = [2.0, -1.0, 0.7]
    first = merged_deltas(made, method, weights=w)
    second = merged_deltas(other, method, weights=w)
    third = merged_deltas(made[::-1], method, weights=w[::-1])
    for name, deltas in true_deltas(made).items():
        pairs = list(zip(true_deltas(other)[name], deltas, strict=True))
        moved = max(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300) for x, y in pairs)
        spectra = [triples(d)[1] for d in (*deltas, sum(deltas)) if d.any()]
        gain = max(s[0] / s[-1] for s in spectra)
        norm = np.linalg.norm(delta(first[name]))
        bound = 2 * rounding(delta(first[name]), deltas, w) * gain + 20 * gain * moved * norm
        assert np.linalg.norm(delta(first[name]) - delta(second[name])) <= bound
        assert np.linalg.norm(delta(first[name]) - delta(third[name])) <= bound
        assert bound < 0.01 * norm


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_another_rounding_of_the_same_deltas_changes_nothing(tmp_path, rng, method):
    """The published definitions over min(d_out, d_in) directions move by tens of percent here."""
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    other = [turned(a, tmp_path / f"turned{i}", rng) for i, a in enumerate(made)]
    first, second = (merged_deltas(some, method) for some in (made, other))
    for name, deltas in true_deltas(made).items():
        moved = np.linalg.norm(delta(first[name]) - delta(second[name]))
        assert moved <= 1e-4 * np.linalg.norm(delta(first[name]))
        if method == "iso_c":
            u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
            v, _, wt = np.linalg.svd(sum(true_deltas(other)[name]), full_matrices=False)
            if len(s) > first[name].rank_before:
                assert np.linalg.norm(u @ vt - v @ wt) > 0.1


def test_iso_c_cut_to_a_rank_keeps_what_led(tmp_path, rng):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    zoo = mpf.open_zoo([a.path for a in made])
    cut = mpf.merge(zoo, "iso_c", rank=3)
    half = mpf.merge(zoo, "iso_c", energy=0.5)
    for two, three in zip(cut.modules, half.modules, strict=True):
        total = sum(true_deltas(made)[two.module.name])
        want, rank = dense_iso(total)
        u, _, v = triples(total)
        level = np.linalg.norm(want) / math.sqrt(rank)
        exact = level * u[:, :3] @ v[:, :3].T
        assert np.linalg.norm(delta(two) - exact) <= 1e-4 * np.linalg.norm(exact)
        assert two.a.shape[0] == 3 and two.rank_before == rank
        lost = float(np.linalg.norm(want - exact))
        assert two.truncation_error == pytest.approx(lost, rel=1e-4, abs=1e-6)
        assert three.a.shape[0] == math.ceil(rank / 2)
    padded = mpf.merge(zoo, "iso_c", rank=21)
    assert all(m.a.shape[0] == 21 for m in padded.modules)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_the_result_is_truncated_saved_and_read_by_peft(tmp_path, rng, method):
    made = CASES["modules missing"](tmp_path, rng)
    zoo = mpf.open_zoo([a.path for a in made])
    cut = mpf.merge(zoo, method, rank=3)
    if method == "tsv_m":
        for one, two in zip(mpf.merge(zoo, method).modules, cut.modules, strict=True):
            want = truncated(delta(one), 3)
            assert np.linalg.norm(delta(two) - want) <= 1e-5 * np.linalg.norm(want)
    cut.save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")
    assert merge_json(tmp_path / "out")["method"] == method
    assert mpf.MERGE_METHODS[method].summary


def test_updates_that_cancel_give_zero(tmp_path, rng):
    one = make_adapter(tmp_path / "one", WIDE, seed=int(rng.integers(1 << 30)))
    negated = {name: (m.a, -m.b) for name, m in one.modules.items()}
    two = make_adapter(tmp_path / "two", WIDE, factors=negated)
    for method in ("tsv_m", "iso_c"):
        for module in merged_deltas([one, two], method).values():
            assert not delta(module).any()


@pytest.mark.parametrize(("argument", "value"), [("tolerance", 0), ("tolerance", 2), ("keep", 0)])
def test_arguments_out_of_range_are_refused(tmp_path, rng, argument, value):
    made = CASES["ragged ranks and rsLoRA"](tmp_path, rng)
    with pytest.raises(InputError, match="must be in"):
        merged_deltas(made, "tsv_m", **{argument: value})
