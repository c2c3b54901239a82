"""Columns of entries with ``device="cuda"``, in Triton's interpreter against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

import entry_child  # noqa: E402
from adapters import make_adapter  # noqa: E402
from sign_cases import FUSED  # noqa: E402
from tolerances import bound  # noqa: E402
from triton_child import child  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.engine import entries  # noqa: E402
from mergeprobe_fast.features.entries import FAMILY  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not FUSED, reason="no instruction set here has fused multiply-adds"),
]
MODULES = {"layers.0.q": (26, 18), "layers.0.down": (9, 40)}
COUNTS = ("conflicts", "both", "top", "zeros", "entries", "looked_at", "modules", "seen")
# Both are sums of positive terms, each within this of float64; a ratio of two is off by both.
BOUND = 2 * bound("entry sums")
# What moves a cosine by as much moves its arccosine by no more than at 1: of a module's entries.
ARC = float(np.arccos(1 - 8 * bound("entry sums"))) / np.pi


@pytest.fixture(scope="module")
def ask():
    with child(entry_child.__file__) as call:
        yield lambda task, *args, settings=(), **named: call((task, args, named, dict(settings)))


@pytest.fixture
def zoo(tmp_path, rng):
    """Five adapters of ragged ranks and types: one without a module, one that is zero at one, one
    huge and one tiny, and a copy."""
    for i in range(5):
        names = list(MODULES)[: 1 if i == 1 else 2]
        sizes = {n: (*MODULES[n], int(rng.integers(1, 5))) for n in names}
        make_adapter(
            tmp_path / "zoo" / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)),
            magnitude=(1.0, 3e-15, 2e14, 0.1, 5.0)[i], dtype="BF16" if i == 3 else "F32",
            zero_b=names[1:] if i == 4 else (),
        )  # fmt: skip
    make_adapter(tmp_path / "zoo" / "copy", sizes)
    for path in (tmp_path / "zoo" / "adapter_4").iterdir():
        (tmp_path / "zoo" / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "zoo"


def on_cpu(zoo, looking):
    found = entries.entry_sums(mpf.open_zoo(zoo), entries.Looking(*looking), threads=1)
    return {**vars(found.adapters), **vars(found.pairs)}


def off(got, want):
    """Names of sums that are off."""
    assert set(got) == set(want)
    wrong = []
    for name, x in want.items():
        allowed = 0.0 if name in COUNTS else BOUND * np.abs(x)
        if name == "expected":
            allowed = ARC * want["both"] + 1e-12 * x
        if name in COUNTS[:5]:
            allowed = 1e-12 * x  # counts times what a sample stands for
        if not (np.abs(got[name] - x) <= allowed).all():
            wrong.append(name)
    return wrong


EXACT, SAMPLE = (None, 0.3, 0), (640, 0.2, 5)
CASES = {
    "exact": (EXACT, {}),
    "of a sample": (SAMPLE, {}),
    "exact, in blocks": (EXACT, {"DEVICE_BLOCK": 3, "WORKSPACE": 1}),
    "of a sample, read in blocks": (SAMPLE, {"CHUNK_BYTES": 1, "FACTOR_BYTES": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_device_adds_up_what_the_cpu_adds_up(ask, monkeypatch, zoo, case):
    looking, settings = CASES[case]
    monkeypatch.setattr(entries, "FEWEST", 128)
    got = ask("sums", str(zoo), looking, settings={"FEWEST": 128, **settings})
    assert off(got, on_cpu(zoo, looking)) == []
    assert (got["looked_at"] < got["entries"]).all() == (looking == SAMPLE)
    for name in ("conflicts", "opposed", "expected"):  # a copy in no entry, and to the bit
        assert got[name][4, 5] == got[name][5, 4] == 0
    for name in ("conflicts", "both", "expected", "mass", "cancelled", "squares", "top"):
        assert np.array_equal(got[name], got[name].T) and not np.diagonal(got[name]).any()


def test_a_planted_fault_is_seen(ask, zoo):
    want = on_cpu(zoo, EXACT)
    got = ask("sums", str(zoo), EXACT, settings={"fault": "a run left out"})
    assert {"conflicts", "mass", "opposed", "cancelled"} <= set(off(got, want))
    swapped = {**want, "opposed": want["opposed"].T}
    assert off(swapped, want) == ["opposed"]


def test_columns_are_those_of_the_cpu(ask, zoo):
    names = [c.name for c in FAMILY.pairs]
    want = mpf.pair_features(zoo, names, threads=1)
    got = ask("columns", str(zoo), names)
    for name in names:
        x, y = np.asarray(want[name]), got[name]
        residual = ARC if name == "sign_conflict_residual" else 0.0
        np.testing.assert_allclose(y, x, rtol=2 * BOUND, atol=residual + 1e-12, err_msg=name)
    assert np.isfinite(np.asarray(want["sign_conflict"])).all()


def test_what_was_added_up_before_a_kill_goes_on(ask, zoo, tmp_path):
    keep, looking = str(tmp_path / "keep"), SAMPLE
    settings = {"FEWEST": 128, "DEVICE_BLOCK": 4}
    whole = ask("sums", str(zoo), looking, settings=settings)
    for stop in (1, 5):  # of three steps a module
        with pytest.raises(mpf.InputError, match="stopped"):
            ask("sums", str(zoo), looking, keep, stop, settings=settings)
    rest = ask("sums", str(zoo), looking, keep, settings=settings)
    for name, values in whole.items():
        np.testing.assert_array_equal(rest[name], values, err_msg=name)


@pytest.mark.parametrize("blocks", [{}, {"CHUNK_BYTES": 1, "FACTOR_BYTES": 1}])
def test_what_is_not_finite_is_named_as_on_the_cpu(ask, zoo, rng, blocks):
    a, b = rng.standard_normal((2, 40)), rng.standard_normal((9, 2))
    for value, reason in ((np.nan, "holds NaN"), (1e30, "overflow float32")):
        a[1, 3], b[2, 1] = value, 1e30
        make_adapter(zoo / "last", {"layers.0.down": (9, 40, 2)},
                     factors={"layers.0.down": (a, b)})  # fmt: skip
        with pytest.raises(mpf.InputError, match=reason) as want:
            on_cpu(zoo, EXACT)
        with pytest.raises(mpf.InputError) as got:
            ask("sums", str(zoo), EXACT, settings=blocks)
        assert str(got.value) == str(want.value)
        assert "layers.0.down" in str(want.value) and "last" in str(want.value)


def test_a_delta_that_is_nothing_but_rounding_counts_as_zero(ask, tmp_path, rng):
    for i in range(2):
        a, b = rng.standard_normal((2, 18)), rng.standard_normal((26, 2))
        if i:
            a, b = np.vstack([a, a]), np.hstack([b, -b])  # cancels but for the last bit
        make_adapter(
            tmp_path / "zoo" / f"a{i}", {"layers.0.q": (26, 18, len(a))},
            factors={"layers.0.q": (a, b)},
        )  # fmt: skip
    want = on_cpu(tmp_path / "zoo", EXACT)
    assert want["modules"].tolist() == [1, 0]
    assert off(ask("sums", str(tmp_path / "zoo"), EXACT), want) == []
