"""Statistics of entries on the device, one module: against float64 and the CPU's entries.

In Triton's interpreter (entry_child.py), or with MERGEPROBE_TRITON_DEVICE=cuda on the device.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")
import entry_child  # noqa: E402
from sign_cases import FUSED, as_cpu, cancelling, mixed  # noqa: E402
from test_entries import COUNTED, definition, looked_at, off, with_atoms  # noqa: E402
from tile_cases import factors  # noqa: E402
from tolerances import bound  # noqa: E402
from triton_child import CHOSEN, MOST_SPILLED, child, version  # noqa: E402

from mergeprobe_fast import BackendError, InputError  # noqa: E402
from mergeprobe_fast.ops import entry_moments, entry_pairs, entry_sizes, sign_conflicts  # noqa: E402
from mergeprobe_fast.ops.entries import Pairs, Sample  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not FUSED, reason="no instruction set here has fused multiply-adds"),
]
same_bits = pytest.mark.skipif(
    CHOSEN != "cuda" and version("triton") < (3, 9),
    reason="the interpreter of Triton before 3.9 rounds a fused multiply-add twice",
)



@pytest.fixture(scope="module")
def ask():
    with child(entry_child.__file__) as call:
        yield lambda task, *args, settings=(), **named: call((task, args, named, dict(settings)))


def there(given):
    """Torch tensors of numpy factors, in the same order of memory; uint16 are bfloat16."""

    def tensor(x):
        if x.dtype == np.uint16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    return [(tensor(b), tensor(a), scale) for b, a, scale in given]


def sample_of(rng, shape, entries):
    return Sample.draw(*shape, entries, int(rng.integers(2**63)), 7)


@same_bits
# The bound of sums is the CPU's: the device adds at most 256 numbers in a row in float32.
@pytest.mark.parametrize(
    ("shape", "entries"),
    [((1, 37), 0), ((37, 1), 0), ((20, 70), 0), ((33, 130), 700), ((9, 49), 1)], ids=str,
)  # fmt: skip
def test_moments_and_pairs_are_what_their_definitions_say(ask, rng, shape, entries):
    given, units = with_atoms(rng, shape, 7), rng.integers(-3, 4, 7)
    sample = sample_of(rng, shape, entries) if entries else None
    x = looked_at(given, sample)
    size = np.abs(x)
    got = ask("moments", there(given), 0.3, sample=sample)
    k = int(0.3 * x.shape[1])
    threshold = np.sort(size, axis=1)[:, -k]
    top = (size >= threshold[:, None]) & (size > 0)
    assert np.array_equal(got["threshold"], threshold)
    assert np.array_equal(got["top"], top.sum(1))
    assert np.array_equal(got["zeros"], (x == 0).sum(1))
    assert (got["entries"] == x.shape[1]).all()
    for mine, true in (
        (got["l1"], size.sum(1)), (got["squares"], (x**2).sum(1)),
        (got["fourths"], (x**4).sum(1)), (got["top_squares"], (x**2 * top).sum(1)),
    ):  # fmt: skip
        assert (np.abs(mine - true) <= bound("entry sums") * true).all()
    pairs = ask("pairs", there(given), threshold, units=units, sample=sample)
    assert off(Pairs(**pairs), definition(x, threshold, units)) == []


@same_bits
def test_all_and_none_of_the_entries_are_top(ask, rng):
    given, shape = with_atoms(rng, (9, 49), 4), (9, 49)
    for sample in (None, sample_of(rng, shape, 200)):
        for density in (0.0, 1.0):
            want = entry_moments(given, density, sample=sample)
            got = ask("moments", there(given), density, sample=sample)
            for name in ("threshold", "top", "zeros", "entries"):
                assert np.array_equal(got[name], getattr(want, name)), name
            assert got["top_squares"].any() == bool(density)


# Pairs are 16 a side in the interpreter and 32 on the device: three tiles.
MANY = 36 if CHOSEN == "cuda" else 19


@pytest.mark.parametrize("split", [0, 5, MANY - 1])
def test_blocks_of_pairs_and_strips_of_entries(ask, rng, split):
    given, sample = with_atoms(rng, (33, 130), MANY), sample_of(rng, (33, 130), 700)
    thresholds = np.full(MANY, np.float32(0.5))
    units = np.arange(MANY) % 5 - 2
    want = definition(looked_at(given, sample), thresholds, units)
    if split:
        kept = np.eye(MANY, dtype=bool)
        kept[:split, split:] = True
        want = {name: np.where(kept, x, 0) for name, x in want.items()}
    small = {"WORKSPACE": 1 if split else 1 << 28, "pair": {"programs": 16 * (split + 1)}}
    pairs = ask("pairs", there(given), thresholds, units=units, split=split, sample=sample,
                settings=small)  # fmt: skip
    assert off(Pairs(**pairs), want) == []


FAULTS = ("a run left out", "units mistaken", "a tile of entries left out", "sides exchanged")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(ask, rng, fault):
    given, sample = factors(rng, (33, 130), [2] * MANY), sample_of(rng, (33, 130), 700)
    thresholds, units = np.full(MANY, np.float32(0.5)), np.arange(MANY) % 5 - 2
    want = definition(looked_at(given, sample), thresholds, units)
    got = ask("pairs", there(given), thresholds, units=units, sample=sample,
              settings={"fault": fault})  # fmt: skip
    wrong = off(Pairs(**got), want)
    assert {"cancelled"} <= set(wrong) if fault == "units mistaken" else len(wrong) > 3


def test_copies_have_equal_bits_wherever_they_are(ask, rng):
    one, two = factors(rng, (20, 40), [3, 3])
    minus = (one[0], -one[1], one[2])
    for split in (0, 2):
        got = ask("pairs", there([one, two, one, minus]), split=split)
        mass, conflict = got["mass"], got["conflict_mass"]
        assert mass[0, 2] == mass[0, 3] == conflict[0, 3] == mass[0, 0] == mass[2, 2] == mass[3, 3]
        assert conflict[0, 2] == 0 and mass[1, 2] == (mass[0, 1] if not split else mass[1, 3])
    company = ask("pairs", there([one, two, *factors(rng, (20, 40), [2] * MANY)]))
    alone = ask("pairs", there([one, two]))
    for name in alone:
        np.testing.assert_array_equal(company[name][:2, :2], alone[name], err_msg=name)


def test_units_that_float32_cannot_tell_apart(ask, rng):
    given = factors(rng, (9, 20), [2] * 8)
    units = np.array([128, -1000, 0, 2000, -149, 127, -126, -1])
    want = entry_pairs(given, units=units).cancelled
    got = ask("pairs", there(given), units=units)["cancelled"]
    # Of each entry, what is below the smallest float32 is lost.
    assert (np.abs(got - want) <= 2 * bound("entry sums") * want + 180 * 2.0**-149).all()
    assert np.isfinite(got).all() and got[1, 2] == 0 < got[0, 1]


@same_bits
def test_signs_and_sizes_of_every_type_and_order_of_memory(ask, rng, monkeypatch):
    monkeypatch.setenv("MERGEPROBE_ISA", FUSED[0])
    some = mixed(rng, 19, 70, [3, 16, 0, 1, 5, 2], zeros=True)
    for given in (some, cancelling(rng, 19, 70, 4)):
        conflicts, both = as_cpu(given, monkeypatch, FUSED[0])
        got = ask("pairs", there(given), magnitudes=False)
        assert np.array_equal(got["conflicts"], conflicts) and np.array_equal(got["both"], both)
        assert not got["mass"].any() and not got["top"].any()
        with np.errstate(invalid="ignore"):
            share = np.triu(conflicts / both, 1)
        shares = ask("signs", there([(b, a, s * 2.0**-140) for b, a, s in given]))
        assert np.array_equal(shares, share + share.T, equal_nan=True)
        squares = [
            (b.float().double().square().sum(0) * a.float().double().square().sum(1)).sum()
            for b, a, _ in there(given)
        ]
        want = [abs(s) * float(x) ** 0.5 for x, (_, _, s) in zip(squares, given, strict=True)]
        np.testing.assert_allclose(ask("sizes", there(given)), want, rtol=bound("tile_squares"))


def test_deltas_of_rank_0_are_zero(ask, rng):
    given = factors(rng, (6, 7), [0, 2, 0])
    want = entry_sizes(given)
    np.testing.assert_allclose(ask("sizes", there(given)), want, rtol=bound("tile_squares"))
    got = ask("moments", there(given), 0.5)
    assert got["threshold"][[0, 2]].tolist() == [0, 0] and got["zeros"].tolist() == [42, 0, 42]
    only = ask("pairs", there(given[:1] * 2))
    assert not any(x.any() for x in only.values())


def test_what_cannot_be_used_is_refused_as_on_the_cpu(ask, rng):
    given = factors(rng, (9, 20), [2, 2, 2])
    sample = Sample.draw(9, 20, 128, 0, 0)
    bad = [(b.copy(), a.copy(), s) for b, a, s in given]
    bad[1][1][1, 3] = np.nan
    bad[2][0][4, 0] = np.inf
    huge = [(b * 1e20, a * 1e19, s) for b, a, s in given]
    other = Sample.draw(40, 60, 128, 0, 0)
    for task, ours, args, options in (
        ("sizes", entry_sizes, (bad,), {}),
        ("moments", entry_moments, (bad,), {}),
        ("moments", entry_moments, (huge,), {}),
        ("moments", entry_moments, (huge,), {"sample": sample}),
        ("pairs", entry_pairs, (bad,), {}),
        ("pairs", entry_pairs, (huge,), {}),
        ("pairs", entry_pairs, (given, np.zeros(2)), {}),
        ("pairs", entry_pairs, (given,), {"split": 4}),
        ("pairs", entry_pairs, (given,), {"sample": other}),
        ("moments", entry_moments, (given, 1.5), {}),
        ("signs", sign_conflicts, (bad,), {}),
    ):
        with pytest.raises(InputError) as want:
            ours(*args, **options)
        with pytest.raises(InputError) as got:
            ask(task, there(args[0]), *args[1:], **options)
        assert str(got.value) == str(want.value)
    with pytest.raises(InputError, match="expected one of 'auto', 'cpu', 'triton'"):
        entry_sizes(given, backend="cuda")
    with pytest.raises(InputError, match=r"factors\[0\]: B must be a matrix"):
        entry_moments(given, backend="triton")


def test_the_kernels_are_not_there_without_a_device(rng):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    from mergeprobe_fast.kernels import _deltas

    if _deltas.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set")
    given = there(factors(rng, (9, 20), [2, 2]))
    for call in (entry_sizes, entry_moments, entry_pairs, sign_conflicts):
        with pytest.raises(BackendError, match="needs a CUDA device"):
            call(given, backend="triton")


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch):
    from mergeprobe_fast.kernels import _deltas

    if _deltas.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set: there is nothing to compile")
    from mergeprobe_fast.kernels import _inspect
    from mergeprobe_fast.kernels._inspect_entries import entry_launches

    for name, launch in entry_launches().items():
        used = _inspect.resources(launch, arch)
        print(f"{name}: {used.registers} registers, {used.shared} bytes shared")
        assert used.stack <= MOST_SPILLED and used.shared <= 32 * 1024, name
        # Entries are the CPU's: nothing is flushed to zero, nothing fused but their chains.
        assert not re.search(r"\.ftz|approx", used.ptx), name
        assert ("fma.rn.f32" in used.ptx) == name.startswith(("moments", "strip")), name
        assert ("mma" in used.ptx) == (name == "counts"), name
    assert set(COUNTED) == {"conflicts", "both", "top"}
