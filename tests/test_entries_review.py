"""What a review of the statistics of entries found, on columns and on their arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from adapters import make_adapter

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.engine import entries as engine
from mergeprobe_fast.features.entries import FAMILY, entry_features
from mergeprobe_fast.ops.angles import singular_values
from mergeprobe_fast.recorded import NOTHING

SIZES = {"m.0": (24, 20, 3), "m.1": (31, 17, 2)}


def open_all(made):
    return mpf.open_zoo([m.path for m in made])


def scaled(folder, made, change):
    factors = {n: change(m) for n, m in made.modules.items()}
    return make_adapter(folder, SIZES, factors=factors)


def test_shares_of_opposites_stay_at_one(tmp_path, rng):
    for k in range(4):
        one = make_adapter(tmp_path / f"{k}_a", SIZES, seed=int(rng.integers(2**32)), dtype="F16")
        two = scaled(tmp_path / f"{k}_b", one, lambda m: (m.a, -m.b))
        table = mpf.pair_features(open_all([one, two]), [entry_features("exact")])
        for name in ("opposed_mass_a_by_b", "opposed_mass_b_by_a", "l1_cancellation"):
            assert 1 - 1e-6 < table[name][0] <= 1, name


def test_ranges_of_adapter_columns_are_said():
    ranges = {c.name: (c.low, c.high) for c in FAMILY.adapters}
    assert ranges == {
        "l1_norm": (0, None), "entry_kurtosis": (1, None), "entry_kurtosis.mean": (1, None),
        "zero_share": (0, 1), "top_energy": (0, 1), "top_threshold": (0, None),
    }  # fmt: skip


def test_a_module_of_which_a_sample_sees_zeros_leaves_the_others_their_mean(tmp_path, rng):
    b = np.zeros((4096, 2))
    b[int(rng.integers(4096))] = 1.0
    sizes = {"m.0": (4096, 1024, 2), "m.1": (40, 50, 2)}
    made = make_adapter(
        tmp_path / "sparse", sizes, factors={"m.0": (rng.standard_normal((2, 1024)), b)},
        seed=int(rng.integers(2**32)),
    )  # fmt: skip
    zoo = open_all([made])
    kurtosis = next(c for c in FAMILY.adapters if c.name == "entry_kurtosis.mean")
    for seed in range(4):
        family = entry_features(engine.FEWEST, seed=seed)
        found = family.compute(zoo, NOTHING, 1)
        if found.adapters.seen[0] == 1:
            x = made.modules["m.1"].delta
            want = x.size * (x**4).sum() / (x**2).sum() ** 2
            assert kurtosis.finish(found)[0] == pytest.approx(want, rel=1e-5)
            return
    raise AssertionError("every sample saw the one row")


def test_deltas_below_float32_are_not_said_to_overflow(tmp_path, rng):
    made = [make_adapter(tmp_path / str(i), SIZES, seed=int(rng.integers(2**32))) for i in (0, 1)]
    tiny = scaled(tmp_path / "tiny", made[0], lambda m: (m.a * 1e-30, m.b * 1e-30))
    table = mpf.pair_features(open_all([*made, tiny]), [entry_features("exact")])
    assert np.isnan(table["sign_conflict"]).tolist() == [False, True, True]


def test_an_overflow_names_the_adapter_which_may_be_left_out(tmp_path, rng):
    made = [make_adapter(tmp_path / str(i), SIZES, seed=int(rng.integers(2**32))) for i in (0, 1)]
    large = scaled(tmp_path / "large", made[0], lambda m: (m.a * 1e20, m.b * 1e20))
    zoo = open_all([made[0], large, made[1]])
    with pytest.raises(InputError, match="overflow float32") as caught:
        mpf.pair_features(zoo, [entry_features("exact")])
    assert zoo.without(caught.value).names == ["0", "1"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"entries": "all"}, "entries"), ({"entries": None}, "entries"),
        ({"density": "x"}, "density"), ({"density": math.nan}, "density"), ({"seed": True}, "seed"),
    ],
)  # fmt: skip
def test_arguments_of_another_kind(options, key):
    with pytest.raises(InputError) as caught:
        entry_features(**options)
    assert caught.value.key == key


def test_the_size_of_a_zoo_is_added_up_once(tmp_path, monkeypatch):
    made = make_adapter(tmp_path / "a", {f"m.{k}": (6, 5, 1) for k in range(30)})
    zoo, calls = open_all([made]), []
    monkeypatch.setattr(engine, "total_entries", lambda z: calls.append(z) or 900)
    entry_features().compute(zoo, NOTHING, 1)
    assert len(calls) == 1


def test_tall_matrices_need_no_more_memory_than_they_have(rng, isa):
    x = rng.standard_normal((3, 40000, 5))
    want = np.linalg.svd(x, compute_uv=False)
    assert np.abs(singular_values(x) - want).max() <= 1e-7 * want.max()
