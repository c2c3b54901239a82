"""Features of sets from a zoo on disk, against deltas and merges that are made."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration, make_points
from set_truth import effective_rank
from set_zoo import DOMAINS, MODULES, SETS, SIZES, Made
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.sets import SET_FEATURES
from mergeprobe_fast.sets import set_features
from mergeprobe_fast.zoo import open_zoo


@pytest.fixture
def made(tmp_path, rng):
    return Made(tmp_path, rng)


def indices(made, s):
    return [made.zoo.names.index(x) if isinstance(x, str) else x for x in s]


def test_a_table_has_a_row_for_each_set(made):
    table = set_features(made.zoo, SETS, calibration=made.calibration.path)
    assert table["members"][1] == "math-b+code-b" and list(table["size"]) == [3, 2, 1, 5, 2]
    assert table.members == [tuple(indices(made, s)) for s in SETS]
    assert table.rows == len(SETS)
    assert table.to_pandas().shape == (len(SETS), len(table))
    assert table.to_arrow().column("members").to_pylist() == list(table["members"])
    np.testing.assert_array_equal(table.per_member("weights")[1, :3], [0.5, 0.5, np.nan])
    with pytest.raises(KeyError, match="leverage"):
        table.per_member("cosine")


def test_without_a_calibration_there_is_geometry_only(made):
    table = set_features(made.zoo, size=2)
    assert table.members == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    assert set(table) == {
        "members", "size", "merged_norm", "superposition", "gram_effective_rank",
        "cosine_effective_rank", "leverage_min", "leverage_mean", "leverage_max",
    }  # fmt: skip
    for s, (i, j) in enumerate(table.members):
        one, other = made.whole(i), made.whole(j)
        assert table["merged_norm"][s] == pytest.approx(np.linalg.norm(one + other) / 2, rel=1e-7)
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert table["leverage_mean"][s] == pytest.approx(cosine**2, abs=1e-7)
        assert table["gram_effective_rank"][s] == pytest.approx(
            effective_rank(np.array([one, other])), rel=1e-7
        )


@pytest.mark.parametrize("version", [1, 2])
def test_retention_is_what_the_merge_does_to_outputs(tmp_path, rng, version):
    """Relative to the base module's outputs where these were recorded (version 2), else raw."""
    made = Made(tmp_path, rng, version=version)
    weights = [rng.normal(0.5, 0.4, len(s)) for s in SETS]
    table = set_features(made.zoo, SETS, weights, calibration=made.calibration.path)
    assert ("retention_raw_worst" in table) == (version == 2)
    for s, (who, w) in enumerate(zip(table.members, weights, strict=True)):
        for raw in (False, True)[:version]:
            x = "_raw" if raw else ""
            for prefix, used in (
                ("", w),
                ("reweighted_", table.per_member(f"reweighted_weights{x}")[s, : len(who)]),
                ("minimax_", table.per_member(f"minimax_weights{x}")[s, : len(who)]),
            ):
                e = [
                    made.error(i, lambda n, u=used, who=who: sum(
                        v * made.delta(j, n) for v, j in zip(u, who, strict=True)
                    ), raw)
                    for i in who
                ]  # fmt: skip
                name = f"{prefix}retention{x}"
                np.testing.assert_allclose(
                    table.per_member(name)[s, : len(who)], 1 - np.array(e), atol=bound("sets")
                )
                assert table[f"{name}_worst"][s] == pytest.approx(1 - max(e), abs=bound("sets"))
                assert table[f"{name}_mean"][s] == pytest.approx(1 - np.mean(e), abs=bound("sets"))


def test_every_feature_has_values_in_its_range_and_a_definition(made):
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng)
    table = set_features(made.zoo, SETS, features="all", calibration=made.calibration.path)
    assert set(table) == {"members", "size", *SET_FEATURES}
    for name, f in SET_FEATURES.items():
        values = table[name]
        assert values.shape == (len(SETS),) and values.dtype == np.float64, name
        if "loss" not in name:
            assert np.isfinite(values).all(), name
        low, high = (-np.inf if f.low is None else f.low), (np.inf if f.high is None else f.high)
        assert (np.isnan(values) | ((values >= low - 1e-9) & (values <= high + 1e-9))).all(), name
        assert f.title and f.definition.endswith("."), name


def test_neither_the_gauge_nor_the_order_of_members_matters(tmp_path, rng):
    made = Made(tmp_path / "one", rng)
    for name, old in zip(made.zoo.names, made.made, strict=True):
        factors = {}
        for module, m in old.modules.items():
            g = np.eye(len(m.a)) + 0.3 * rng.standard_normal((len(m.a), len(m.a)))
            factors[module] = (g @ m.a, m.b @ np.linalg.inv(g))
        make_adapter(tmp_path / "two" / name, {n: MODULES[n] for n in factors}, factors=factors,
                     alphas={n: m.scale * len(m.a) for n, m in old.modules.items()})  # fmt: skip
    first = set_features(made.zoo, SETS, features="all", calibration=made.calibration.path)
    order = [list(reversed(s)) for s in SETS]
    second = set_features(
        open_zoo(tmp_path / "two"), order, features="all", calibration=made.calibration.path
    )
    assert set(first) == set(second)
    for name in set(first) - {"members", "atoms_kept"}:
        np.testing.assert_allclose(
            second[name], first[name], rtol=bound("gauge"), atol=bound("gauge"), err_msg=name
        )
    # Atoms at the edge of being dropped may go either way with the last bit.
    np.testing.assert_allclose(second["atoms_kept"], first["atoms_kept"], atol=0.1)


def test_threads_change_nothing(made):
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng)
    tables = [
        set_features(made.zoo, SETS, features="all", calibration=made.calibration.path, threads=t)
        for t in (1, 3)
    ]
    for name in set(tables[0]) - {"members"}:
        assert tables[0][name].tobytes() == tables[1][name].tobytes(), name


def test_spans_are_those_of_dense_projectors(made):
    table = set_features(made.zoo, SETS, features=["stacked_effective_rank",
                                                   "subspace_leverage_min"])  # fmt: skip
    for s, who in enumerate(table.members):
        ranks, shares, inside, total = [], [], np.zeros(len(who)), np.zeros(len(who))
        for name in SIZES:
            deltas = [made.delta(i, name) for i in who]
            norms = [np.linalg.norm(w) for w in deltas]
            ranks.append(effective_rank(np.concatenate(
                [w / n for w, n in zip(deltas, norms, strict=True) if n > 0]
            )))  # fmt: skip
            shares.append(sum(
                (n / np.linalg.norm(made.whole(i))) ** 2 for n, i in zip(norms, who, strict=True)
            ))  # fmt: skip
            for k, w in enumerate(deltas):
                others = deltas[:k] + deltas[k + 1 :]
                total[k] += norms[k] ** 2
                if others:
                    p = projector(np.concatenate(others, axis=1))
                    q = projector(np.concatenate(others).T)
                    inside[k] += np.linalg.norm(p @ w @ q) ** 2
        assert table["stacked_effective_rank"][s] == pytest.approx(
            np.average(ranks, weights=shares), rel=bound("sets")
        )
        found = table.per_member("subspace_leverage")[s, : len(who)]
        np.testing.assert_allclose(found, inside / total, atol=bound("sets"))
        assert table["subspace_leverage_min"][s] == pytest.approx((inside / total).min(), abs=1e-8)


def projector(columns):
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    u = u[:, s > 1e-6 * s[0]] if s.size and s[0] > 0 else u[:, :0]
    return u @ u.T


def test_names_that_are_none_and_sets_that_are_none_are_refused(made):
    zoo, cal = made.zoo, made.calibration.path
    for arguments, key in (
        ({"members": [["math-a", "chess"]]}, "members[0]"),
        ({"members": [[0, 5]]}, "members[0]"),
        ({"members": [[0, 1], [2, "math-a", 2]]}, "members[1]"),
        ({"members": [[]]}, "members[0]"),
        ({"members": []}, "members"),
        ({"members": "math-a"}, "members"),
        ({"members": ["math-a"]}, "members[0]"),
        ({}, "members"),
        ({"size": 6}, "size"),
        ({"size": 0}, "size"),
        ({"size": 2, "members": [[0]]}, "size"),
        ({"size": 2, "weights": "two"}, "weights"),
        ({"size": 2, "weights": [[1, 1]]}, "weights"),
        ({"members": [[0, 1]], "weights": [[1.0]]}, "weights[0]"),
        ({"members": [[0, 1]], "weights": [[1.0, np.nan]]}, "weights[0]"),
        ({"size": 2, "features": ["charm"]}, "features"),
        ({"size": 2, "features": ["retention_worst"]}, "features"),
        ({"size": 2, "features": ["loss_change_worst"], "calibration": cal}, "features"),
        ({"size": 2, "features": ["leverage_min", "leverage_min"]}, "features"),
    ):
        with pytest.raises(InputError) as error:
            set_features(zoo, **arguments)
        assert error.value.key == key, arguments


def test_a_module_that_was_not_calibrated_is_named(tmp_path, rng):
    made = Made(tmp_path, rng)
    make_calibration(tmp_path / "less", {n: SIZES[n] for n in list(SIZES)[:2]}, DOMAINS, rng)
    with pytest.raises(InputError, match=r"layers\.1\.q"):
        set_features(made.zoo, size=2, calibration=tmp_path / "less")


def test_a_sum_is_weights_of_one(made):
    one = set_features(made.zoo, SETS, "one")
    same = set_features(made.zoo, SETS, [np.ones(len(s)) for s in SETS])
    assert one["merged_norm"].tobytes() == same["merged_norm"].tobytes()
    assert (one["merged_norm"] > set_features(made.zoo, SETS)["merged_norm"] - 1e-12).all()


def test_a_zero_adapter_makes_its_sets_undefined_and_no_other(tmp_path, rng):
    change = [{}, {"zero_b": True}, {}, {}, {}]
    made = Made(tmp_path, rng, change=change)
    make_points(made.calibration.path, list(made.zoo), made.domains, rng)
    sets = [["math-a", "math-b"], ["math-a", "code-a"]]
    table = set_features(made.zoo, sets, features="all", calibration=made.calibration.path)
    for name in SET_FEATURES:
        if "loss" in name or name in ("merged_norm", "superposition", "gram_effective_rank",
                                      "stacked_effective_rank"):  # fmt: skip
            continue
        assert np.isnan(table[name][0]) and np.isfinite(table[name][1]), name
