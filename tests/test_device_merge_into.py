"""Adding into base weights with ``device="cuda"``: the CPU's bytes, sums and refusals."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

from adapters import make_adapter
from bases import FORMAT, as_stored, half_ulp, make_base, sums, tensor_bytes, weights_of
from dense_merge import seed_from
from device_merge_child import into, there

from mergeprobe_fast.io.dtypes import STORAGE, from_float

Q, DOWN, EMBED, CONV = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens",
    "model.patch",
)  # fmt: skip
SIZES = {Q: (12, 10, 4), DOWN: (10, 24, 3), EMBED: (10, 16, 2), CONV: (8, 18, 2)}
SHAPES = {Q: (12, 10), DOWN: (10, 24), EMBED: (16, 10), CONV: (8, 2, 3, 3)}
ODD = {"embeddings": (EMBED,), "convs": {CONV: (2, 3, 3)}}
# Entries of a block and of a strip: several of each in every tensor, and one of each.
SIZES_THERE = ((50, 130), (1 << 22, 1 << 24))


@pytest.fixture(scope="module")
def on_device():
    with there() as call:
        yield call


@pytest.fixture
def made(tmp_path, rng):
    """Two adapters of every kind of module, ragged ranks, a missing module."""
    lacking = {name: size for name, size in SIZES.items() if name != Q}
    options = {"magnitude": 0.02, "dtype": "BF16", **ODD}
    return [
        make_adapter(tmp_path / "a", SIZES, seed=seed_from(rng), rslora=True, **options),
        make_adapter(tmp_path / "b", lacking, seed=seed_from(rng), rank=5, alpha=3, **options),
    ]


def base_of(folder, dtype, seed, **given):
    adapted = {f"{name}.weight": (dtype, shape) for name, shape in SHAPES.items()}
    return make_base(folder, {"model.norm.weight": ("F32", (10,)), **adapted, **given}, seed=seed)


def same_numbers(found, want):
    """Reports: texts and counts the same, float64 sums of a few hundred terms."""
    assert set(found) == set(want)
    for name, y in want.items():
        x = found[name]
        if isinstance(y, dict):
            same_numbers(x, y)
        elif isinstance(y, float):
            # A rounding error, or what is left of a cut, may be 0 but for float64.
            assert abs(x - y) <= 1e-7 * abs(y) + 1e-12, name
        else:
            assert x == y, name


def undecided(got, want, exact, size, dtype):
    """Entries that differ although base + delta is not in the middle of both, to float64."""
    apart = got != want
    middle = np.abs(exact - (got + want) / 2) <= 2.0**-44 * (size + np.abs(exact))
    larger = np.maximum(np.abs(got), np.abs(want))
    return apart & ~(middle & (np.abs(got - want) <= 2.001 * half_ulp(larger, dtype)))


@pytest.mark.parametrize("dtype", FORMAT)
def test_products_are_added_as_on_the_cpu(on_device, made, tmp_path, rng, dtype):
    """Bytes may differ only where the last place of a float64 product decides."""
    base = base_of(tmp_path / "base", dtype, seed_from(rng))
    paths, truth, before = [str(m.path) for m in made], sums(made, [0.5, 0.5]), weights_of(base)
    out = tmp_path / "cpu"
    want = into(paths, str(base), str(out), "linear", device="cpu")
    for k, sizes in enumerate(SIZES_THERE):
        there = tmp_path / f"there{k}"
        got = on_device("into", paths, str(base), str(there), "linear", sizes=sizes)
        same_numbers(got, want)
        new, old = weights_of(there), weights_of(out)
        assert set(new) == set(old)
        for name, (delta, size, kind) in truth.items():
            key, shape = f"{name}.weight", SHAPES[name]
            exact = before[key] + as_stored(delta, kind, shape, flipped=False)
            size = as_stored(size, kind, shape, flipped=False)
            # The factors of the sum are rounded to float32 on both sides alike.
            wrong = undecided(new[key], old[key], exact, size * 2.0**20, dtype)
            assert not wrong.any(), (name, new[key][wrong], old[key][wrong])
        untouched = tensor_bytes(out)["model.norm.weight"]
        assert tensor_bytes(there)["model.norm.weight"] == untouched
    # The fault: whatever is rounded away from zero is lost.
    broken = tmp_path / "broken"
    on_device("into", paths, str(base), str(broken), "linear", fault="rounding")
    new = weights_of(broken)
    assert any((new[key] != old[key]).mean() > 0.2 for key in new if key != "model.norm.weight")


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rules_on_entries_are_added_as_on_the_cpu(on_device, made, tmp_path, rng, method, dtype):
    """Their float32 entries have the CPU's bits, or differ by the roundings of a chain."""
    base = base_of(tmp_path / "base", dtype, seed_from(rng))
    paths = [str(m.path) for m in made]
    want = into(paths, str(base), str(tmp_path / "cpu"), method, device="cpu")
    got = on_device("into", paths, str(base), str(tmp_path / "there"), method, sizes=(50, 130))
    old, new = weights_of(tmp_path / "cpu"), weights_of(tmp_path / "there")
    assert set(got["modules"]) == set(want["modules"]) and set(old) == set(new)
    for name, (_, size, kind) in sums(made, [2, 2]).items():
        x, y = new[f"{name}.weight"], old[f"{name}.weight"]
        step = 2.001 * half_ulp(np.maximum(np.abs(y), np.abs(x)), dtype)
        step += 2.0**-19 * as_stored(size, kind, SHAPES[name], flipped=False)
        assert (np.abs(x - y) <= step).all(), name
        # What a chain of 5 is off by is a thousandth of a weight's ulp: few are that near a middle.
        assert np.count_nonzero(x != y) <= 3 + x.size // 50, name
    for name, row in want["modules"].items():
        assert got["modules"][name]["norm"] == pytest.approx(row["norm"], rel=1e-5)


def test_a_method_of_factors_at_a_rank(on_device, made, tmp_path, rng):
    base = base_of(tmp_path / "base", "F32", seed_from(rng))
    arguments = [str(m.path) for m in made], str(base)
    want = into(*arguments, str(tmp_path / "cpu"), "tsv_m", rank=2, device="cpu")
    got = on_device("into", *arguments, str(tmp_path / "there"), "tsv_m", rank=2)
    same_numbers(got["total"], want["total"])
    old, new = weights_of(tmp_path / "cpu"), weights_of(tmp_path / "there")
    for key, y in old.items():
        # Factors are float32 of numbers that agree to 1e-10: 2 u32 |b| |a|, some times the weight.
        assert np.abs(new[key] - y).max() <= 2.0**-20 * np.abs(y).max()


def test_refusals_are_those_of_the_cpu(on_device, made, tmp_path, rng):
    """A base that is not finite, and a sum that its type does not hold."""
    full = np.full(SHAPES[DOWN], 65504.0)
    broken = rng.standard_normal(SHAPES[Q])
    broken[3, 4] = np.nan
    paths = [str(m.path) for m in made]
    cases = {
        "not finite": {f"{Q}.weight": ("F16", SHAPES[Q], from_float(broken, "F16"))},
        "overflows F16": {f"{DOWN}.weight": ("F16", SHAPES[DOWN], from_float(full, "F16"))},
    }
    for k, (name, given) in enumerate(cases.items()):
        base = base_of(tmp_path / f"base{k}", "F16", seed_from(rng), **given)
        # Half of 65504's ulp is 16: the update must pass it somewhere.
        options = {"weights": [1e5, 1e5]} if "overflows" in name else {}
        out = str(tmp_path / f"out{k}")
        want = into(paths, str(base), out, "linear", device="cpu", **options)
        got = on_device("into", paths, str(base), out, "linear", **options)
        assert got == want and str(base) in want["error"], name
        assert ("NaN" if k == 0 else "overflows F16") in want["error"]
        assert not (tmp_path / f"out{k}").exists()


@pytest.mark.parametrize("dtype", FORMAT)
def test_a_sum_is_rounded_once(on_device, rng, dtype):
    """Every kind of number, and those nearest to the middle between two of the format."""
    wide = rng.standard_normal(4000) * 10.0 ** rng.integers(-44, 39, 4000)
    some = from_float(rng.standard_normal(4000) * 10.0 ** rng.integers(-7, 5, 4000), dtype)
    one, next_ = (some + k for k in np.array([0, 1], some.dtype)) if dtype == "BF16" else (
        some, np.nextafter(some, STORAGE[dtype].type(np.inf))
    )  # fmt: skip
    values = [_values(x, dtype) for x in (one, next_)]
    middle = (values[0] + values[1]) / 2
    middle = middle[np.isfinite(middle)]
    odd = [0.0, -0.0, 65519.999999999, 65520.0, -65520.0, 1e-320, 3.4e38, 1e300, np.inf]
    x = np.concatenate([
        wide, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), odd,
        middle * (1 + 2.0**-30), middle * (1 - 2.0**-30),
    ])  # fmt: skip
    want = from_float(x, dtype)
    got = on_device("rounded", x, dtype).view(want.dtype)
    assert (got.view(f"u{want.itemsize}") == want.view(f"u{want.itemsize}")).all()
    if dtype == "F16":  # the fault: twice, by way of float32
        with np.errstate(over="ignore"):
            assert (x.astype(np.float32).astype(np.float16) != want).any()


def _values(raw, dtype):
    from mergeprobe_fast.io.dtypes import to_f32

    return to_f32(raw, dtype).astype(np.float64)
