"""Features of merges against merges that are made, outputs, and loops over texts."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration, make_points
from set_zoo import DOMAINS, MODULES, SETS, SIZES, Made
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.merge_columns import MERGE_FEATURES, OWN, level_columns
from mergeprobe_fast.merge_tables import merge_tables
from mergeprobe_fast.recorded import open_recorded


@pytest.fixture
def made(tmp_path, rng):
    return Made(tmp_path, rng)


CANCELLING = ("change_cosine", "foreign", "change_to_self", "disturbance")


def place(made, s):
    return [made.zoo.names.index(x) if isinstance(x, str) else x for x in s]


def norm(x):
    return float(np.sqrt(x @ x))


def geometry(own, merged, suffix):
    """Of flat vectors, from their definitions."""
    added = merged - own
    across = added - (added @ own) / (own @ own) * own
    return {
        f"change_to_self{suffix}": norm(added) / norm(own),
        f"change_cosine{suffix}": added @ own / (norm(added) * norm(own)),
        f"merged_to_self{suffix}": norm(merged) / norm(own),
        f"merged_cosine{suffix}": merged @ own / (norm(merged) * norm(own)),
        f"kept{suffix}": merged @ own / (own @ own),
        f"foreign{suffix}": norm(across) / norm(own),
    }


def expected(made, i, size, merged, relative=True):
    """Everything but points, of member i of a merge given as a function of the module."""
    whole = np.concatenate([merged(n).ravel() for n in SIZES])
    out = made.outputs(i, merged, not relative)
    own = made.outputs(i, lambda n: made.delta(i, n), not relative)
    raw, raw_own = (made.outputs(i, f, True) for f in (merged, lambda n: made.delta(i, n)))
    return {
        "size": size,
        **geometry(made.whole(i), whole, ""),
        **geometry(own, out, "_inputs"),
        "error": norm(out - own) ** 2 / norm(own) ** 2,
        "error_raw": norm(raw - raw_own) ** 2 / norm(raw_own) ** 2,
        "disturbance": norm(out - own),
    }


def compare(table, row, truth):
    # A length left of two that nearly cancel, and a cosine of it, have the root of the bound.
    for name, value in truth.items():
        close = bound("sets")
        if name.removesuffix("_inputs") in CANCELLING:
            close = close**0.5
        assert table[name][row] == pytest.approx(value, rel=close, abs=close), name


@pytest.mark.parametrize("version", [1, 2])
def test_sums_with_weights_are_what_they_do_to_weights_and_outputs(tmp_path, rng, version):
    made = Made(tmp_path, rng, version=version)
    weights = [rng.normal(0.5, 0.6, len(s)) for s in SETS]
    merges = [mpf.Merge(s, weights=w) for s, w in zip(SETS, weights, strict=True)]
    table = mpf.merge_features(made.zoo, merges, calibration=made.calibration.path)
    assert table.level == "calibration" and table.rows == sum(map(len, SETS))
    row = 0
    for s, w in zip(SETS, weights, strict=True):
        who = place(made, s)

        def merged(n, who=who, w=w):
            return sum(v * made.delta(j, n) for v, j in zip(w, who, strict=True))

        for i, weight in zip(who, w, strict=True):
            assert table["member"][row] == made.zoo.names[i]
            assert table["members"][row] == "+".join(made.zoo.names[j] for j in who)
            assert table["weight"][row] == weight and table["outside"][row] == 0
            compare(table, row, expected(made, i, len(who), merged, relative=version == 2))
            row += 1


@pytest.mark.parametrize("method", ["regmean", "svd", "ties", "knots"])
def test_other_methods_are_run_and_measured(made, method):
    sets = [SETS[0], SETS[3], SETS[1]]
    merges = [mpf.Merge(s, method, rank=None if method == "regmean" else 3) for s in sets]
    table = mpf.merge_features(made.zoo, merges, calibration=made.calibration.path)
    row = 0
    for s in sets:
        who = place(made, s)
        zoo = mpf.Zoo([made.zoo[i] for i in who])
        data = {"calibration": made.calibration.path} if method == "regmean" else {}
        result = mpf.merge(zoo, method, None, merges[0].rank, dtype="F32", **data)
        factors = {m.module.name: m.b.astype(float) @ m.a for m in result.modules}
        for i in who:
            compare(table, row, expected(
                made, i, len(who), lambda n, f=factors: f.get(n, np.zeros(SIZES[n]))
            ))  # fmt: skip
            row += 1


def test_what_no_combination_has_is_outside(made):
    """The rest of a least squares fit on the inputs of each member, by numpy's own."""
    who = place(made, SETS[0])
    table = mpf.merge_features(made.zoo, [mpf.Merge(SETS[0], "regmean")],
                               calibration=made.calibration.path)  # fmt: skip
    result = mpf.merge(mpf.Zoo([made.zoo[i] for i in who]), "regmean", dtype="F32",
                       calibration=made.calibration.path)  # fmt: skip
    factors = {m.module.name: m.b.astype(float) @ m.a for m in result.modules}
    for row, i in enumerate(who):
        columns = np.array([made.outputs(i, lambda n, j=j: made.delta(j, n)) for j in who]).T
        aim = made.outputs(i, lambda n: factors.get(n, np.zeros(SIZES[n])))
        left = aim - columns @ np.linalg.lstsq(columns, aim)[0]
        assert table["outside"][row] == pytest.approx(
            norm(left) / norm(columns[:, row]), rel=1e-4, abs=bound("sets") ** 0.5
        )
        assert 0.01 < table["outside"][row]


def test_a_merge_that_is_a_sum_reads_the_same_either_way(made):
    """Merged adapters are measured by their factors, sums by inner products: "cat" is both."""
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng)
    recorded = open_recorded(made.zoo, made.calibration.path)
    tables = merge_tables(made.zoo, recorded)
    for s in (SETS[0], SETS[3]):
        who = place(made, s)
        w = made.rng.uniform(0.3, 1.5, len(who))
        result = mpf.merge(mpf.Zoo([made.zoo[i] for i in who]), "cat", w.tolist(), dtype="F32")
        one = tables.features(np.array([who], np.int32), w[None])
        other = tables.of_merged([(who, result)])
        assert one.keys() == other.keys() == set(level_columns("points"))
        for name in one:
            if name.startswith("others_"):
                continue  # nobody knows the weights of a merge that is given
            close = 2e-3 if name == "outside" else bound("sets") ** 0.5
            np.testing.assert_allclose(one[name], other[name], rtol=close, atol=close, err_msg=name)


def test_a_merge_of_others_or_in_another_order_is_refused(made):
    tables = merge_tables(made.zoo)
    result = mpf.merge(mpf.Zoo([made.zoo[0], made.zoo[2]]), "cat", [1.0, 2.0], dtype="F32")
    assert np.isfinite(tables.of_merged([([0, 2], result)])["change_to_self"]).all()
    for wrong in ([2, 0], [0, 1], [0], [0, 2, 3]):
        with pytest.raises(InputError, match="were merged, not"):
            tables.of_merged([(wrong, result)])


def test_losses_are_those_of_a_loop_over_texts(made):
    points = make_points(made.calibration.path, list(made.zoo), made.domains, made.rng)
    weights = [made.rng.normal(0.5, 0.6, len(s)) for s in SETS]
    merges = [mpf.Merge(s, weights=w) for s, w in zip(SETS, weights, strict=True)]
    table = mpf.merge_features(made.zoo, merges, calibration=made.calibration.path)
    assert table.level == "points"
    row, seen = 0, 0
    for s, w in zip(SETS, weights, strict=True):
        who = place(made, s)
        for at, i in enumerate(who):
            d = np.array(w)
            d[at] -= 1
            trained = f"trained:{made.zoo.names[i]}"
            for kind, key in (("trained", trained), ("base", f"base:{made.domains[i]}")):
                t = {n: points.tensors[f"{n}.{key}"] for n in ("phi_data", "phi_model", "tokens")}
                gain = (points.tensors[f"base_loss.{trained}"]
                        - points.tensors[f"loss.{trained}"]).mean()  # fmt: skip
                first = curved = observed = absolute = own = both = 0.0
                for text, tokens in enumerate(t["tokens"]):
                    along, mine = t["phi_model"][text, who] @ d, t["phi_model"][text, i]
                    data = t["phi_data"][text, who] @ d
                    share = 1 / len(t["tokens"])
                    first += share * data
                    curved += share * tokens * along**2 / 2
                    observed += share * tokens * data**2 / 2
                    absolute += share * tokens**0.5 * abs(along)
                    own += share * tokens * mine**2 / 2
                    both += share * tokens * along * mine
                if not gain > 0:
                    assert np.isnan(table[f"curvature_{kind}"][row])
                    continue
                seen += 1
                truth = {
                    f"first_order_{kind}": first / gain, f"curvature_{kind}": curved / gain,
                    f"observed_curvature_{kind}": observed / gain,
                    f"absolute_curvature_{kind}": absolute**2 / 2 / gain,
                    f"fisher_to_self_{kind}": (curved / own) ** 0.5,
                    f"fisher_cosine_{kind}": both / 2 / (curved * own) ** 0.5,
                    f"damage_{kind}": (first + curved + (both if kind == "base" else 0)) / gain,
                }  # fmt: skip
                for name, value in truth.items():
                    assert table[name][row] == pytest.approx(value, rel=1e-6, abs=1e-9), name
            row += 1
    defined = [np.isfinite(table[f"curvature_{kind}"]).sum() for kind in ("trained", "base")]
    assert seen == sum(defined)


def test_numbers_of_adapters_stand_beside_the_member_and_its_company(made):
    calibration = made.calibration.path
    own = mpf.adapter_features(made.zoo, calibration=calibration)
    table = mpf.merge_features(made.zoo, [mpf.Merge([0, 2, 4], weights=[1.0, -2.0, 0.5]), [3]],
                               calibration=calibration)  # fmt: skip
    for name in ("norm", "stable_rank", "self_disturbance", "drift_effective_rank"):
        assert table[f"member_{name}"].tolist() == [own[name][i] for i in (0, 2, 4, 3)]
        size = [norm(made.outputs(2, lambda n, j=j: made.delta(j, n))) for j in (0, 4)]
        share = np.square([1.0 * size[0], 0.5 * size[1]])
        assert table[f"others_{name}"][1] == pytest.approx(
            share @ [own[name][0], own[name][4]] / share.sum(), rel=1e-6
        )
        assert np.isnan(table[f"others_{name}"][3])  # alone


def test_a_table_says_of_what_base_it_is(made):
    own = mpf.merge_features(made.zoo, SETS)
    assert own.base_model == made.zoo.base_model and own.fingerprint is None
    table = mpf.merge_features(made.zoo, SETS, calibration=made.calibration.path)
    info = mpf.open_calibration(made.calibration.path).info
    assert table.base_model == (made.zoo.base_model or info.base_model)
    assert table.fingerprint == info.config_sha256


def test_every_column_has_a_definition_and_keeps_to_its_range(made):
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng)
    table = mpf.merge_features(made.zoo, SETS, calibration=made.calibration.path)
    assert [n for n in table if n not in ("merge", "members", "method", "member", "weight")] == [
        *level_columns("points")
    ]
    for name, c in MERGE_FEATURES.items():
        values = table[name][np.isfinite(table[name])]
        # Drawn losses may leave no adapter any gain, of which shares could be taken.
        assert len(values) or not (table["member_gain"] > 0).any(), name
        assert c.title and c.definition.endswith("."), name
        assert (values >= (-np.inf if c.low is None else c.low)).all(), name
        assert (values <= (np.inf if c.high is None else c.high)).all(), name
    own = mpf.adapter_features(made.zoo, calibration=made.calibration.path)
    assert {c.name for c in OWN} <= {*own}


def test_neither_gauge_nor_order_matters_and_unknown_is_unknown(tmp_path, rng):
    made = Made(tmp_path, rng)
    one = mpf.merge_features(made.zoo, [[0, 1, 2]], calibration=made.calibration.path)
    other = mpf.merge_features(made.zoo, [[2, 0, 1]], calibration=made.calibration.path)
    weights = mpf.merge_features(made.zoo, [[0, 1, 2]])
    assert weights.level == "weights" and set(weights) < set(one)
    for name in one:
        if name in ("merge", "members"):
            continue
        np.testing.assert_array_equal(one["member"][[2, 0, 1]], other["member"])
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(one[name][[2, 0, 1]], other[name], rtol=1e-6, atol=1e-9,
                                       err_msg=name)  # fmt: skip


def test_zero_and_equal_adapters_are_no_error(tmp_path, rng):
    zero = [{}, {}, {"zero_b": True}, {}, {}]
    made = Made(tmp_path, rng, change=zero)
    names = made.zoo.names
    at = next(i for i in range(5) if not made.whole(i).any())
    table = mpf.merge_features(made.zoo, [[at, (at + 1) % 5]], calibration=made.calibration.path)
    assert np.isnan(table["error"][0]) and table["member"][0] == names[at]
    assert table["change_to_self"][1] == 0 and table["error"][1] == 0
    assert np.isnan(table["change_cosine"][1])  # of nothing
    make_adapter(tmp_path / "same" / "math-a", MODULES, seed=5)
    make_adapter(tmp_path / "same" / "math-b", MODULES, seed=5)
    calibration = make_calibration(tmp_path / "own", SIZES, DOMAINS, rng)
    twins = mpf.open_zoo(tmp_path / "same")
    for m in (mpf.Merge([0, 1], weights="mean"), mpf.Merge([0, 1], "regmean")):
        table = mpf.merge_features(twins, [m], calibration=calibration.path)
        assert (table["error"] < 1e-6).all() and (table["outside"] < 1e-2).all()
    best = mpf.merge_features(twins, [mpf.Merge([0, 1], weights="minimax")],
                              calibration=calibration.path)  # fmt: skip
    assert best["weight"].sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("merge", "needle"),
    [
        (mpf.Merge([0, 1], "nuslerp"), "no method 'nuslerp'"),
        (mpf.Merge([0, 1], weights="best"), "'best' are none of one, mean"),
        (mpf.Merge([0, 1], weights="minimax"), "need a calibration"),
        (mpf.Merge([0, 1], weights=[1.0]), "expected 2 finite weights"),
        (mpf.Merge([0, 1], weights=[1.0, np.nan]), "expected 2 finite weights"),
        (mpf.Merge(["math-a", "who"]), "no adapter 'who'"),
        (mpf.Merge([0, 0]), "twice"),
        (mpf.Merge([]), "empty"),
        (mpf.Merge([0, 1], "regmean"), "calibration"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(made, merge, needle):
    with pytest.raises(InputError, match=needle):
        mpf.merge_features(made.zoo, [merge])
