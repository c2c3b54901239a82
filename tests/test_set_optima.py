"""What a set could keep at best, against dense least squares over every atom and every merge."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_points
from scipy.optimize import minimize, nnls
from set_zoo import SETS, SIZES, Made
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.set_loss import TRUST
from mergeprobe_fast.sets import set_features
from mergeprobe_fast.zoo import open_zoo


@pytest.fixture
def made(tmp_path, rng):
    return Made(tmp_path, rng)


def features(made, names, sets=SETS, **arguments):
    return set_features(
        made.zoo, sets, features=names, calibration=made.calibration.path, **arguments
    )


def own_energy(made, i):
    own = made.outputs(i, lambda n: made.delta(i, n))
    return own @ own


def atom_system(made, who, name):
    """Rows: outputs of one module on each member's inputs over the root of its whole energy."""
    atoms = made.atoms(who, name)
    blocks, targets = [], []
    for place, i in enumerate(who):
        g = made.domains[i]
        x = made.calibration.inputs[g, name]
        scale = np.sqrt(made.count(g, name) / len(x) / own_energy(made, i))
        columns = [(x @ delta.T).ravel() * scale for _, delta in atoms]
        blocks.append(np.array(columns).T)
        targets.append(sum(
            (c for c, (owner, _) in zip(columns, atoms, strict=True) if owner == place),
            np.zeros(blocks[-1].shape[0]),
        ))  # fmt: skip
    return atoms, blocks, targets


def test_the_best_weights_of_atoms_are_those_of_least_squares_on_outputs(made):
    table = features(made, ["atom_retention_worst", "atom_retention_mean", "pruned_retention_worst",
                            "pruned_retention_mean", "atoms_kept", "atom_gap",
                            "reweighted_retention_mean"])  # fmt: skip
    for s, who in enumerate(table.members):
        error = {"atom": np.zeros(len(who)), "pruned": np.zeros(len(who))}
        kept = count = 0
        for name in SIZES:
            _, blocks, targets = atom_system(made, who, name)
            rows, target = np.concatenate(blocks), np.concatenate(targets)
            free = np.linalg.lstsq(rows, target, rcond=1e-12)[0]
            pruned = nnls(rows, target)[0]
            kept, count = kept + np.count_nonzero(pruned > 1e-7), count + len(pruned)
            for kind, z in (("atom", free), ("pruned", pruned)):
                error[kind] += [
                    ((b @ z - t) ** 2).sum() for b, t in zip(blocks, targets, strict=True)
                ]
        for kind, e in error.items():
            got = table[f"{kind}_retention_worst"][s], table[f"{kind}_retention_mean"][s]
            assert got == pytest.approx((1 - e.max(), 1 - e.mean()), abs=1e-6), (s, kind)
        assert table["atoms_kept"][s] == pytest.approx(kept / count, abs=1.5 / count)
        assert table["atom_gap"][s] == pytest.approx(
            table["atom_retention_mean"][s] - table["reweighted_retention_mean"][s], abs=1e-12
        )


def test_inputs_of_other_domains_and_modules_that_are_not_relative_would_show(made):
    """The planted faults."""
    names = ["pruned_retention_mean", "regmean_retention_mean"]
    right = features(made, names)
    other = {"math": "law", "law": "code", "code": "math"}
    moved = features(made, names, domains=[other[d] for d in made.domains])
    for name in names:
        assert (np.abs(moved[name] - right[name]) > 1e-3).any(), name
    made.count = lambda domain, module, raw=False: 1.0
    error = np.zeros(len(SETS[0]))
    for module in SIZES:
        _, blocks, targets = atom_system(made, right.members[0], module)
        z = nnls(np.concatenate(blocks), np.concatenate(targets))[0]
        error += [((b @ z - t) ** 2).sum() for b, t in zip(blocks, targets, strict=True)]
    assert abs(1 - error.mean() - right["pruned_retention_mean"][0]) > 1e-4


def test_the_regmean_of_a_set_is_the_least_squares_merge_of_its_outputs(made):
    table = features(made, ["regmean_retention_worst", "regmean_retention_mean", "optimum_gap"])
    for s, who in enumerate(table.members):
        error = np.zeros(len(who))
        for name in SIZES:
            x, y = [], []
            for i in who:
                g = made.domains[i]
                rows = made.calibration.inputs[g, name]
                scale = np.sqrt(made.count(g, name) / len(rows) / own_energy(made, i))
                x.append(rows * scale)
                y.append(rows @ made.delta(i, name).T * scale)
            m = np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0]
            error += [((a @ m - b) ** 2).sum() for a, b in zip(x, y, strict=True)]
        found = table.per_member("regmean_retention")[s, : len(who)]
        np.testing.assert_allclose(found, 1 - error, atol=1e-4)
        assert table["regmean_retention_mean"][s] == pytest.approx(1 - error.mean(), abs=2e-6)
        assert table["regmean_retention_worst"][s] == pytest.approx(found.min(), abs=1e-12)


def test_every_freedom_buys_something(made):
    """value(weights) >= value(atoms) >= value(any merge): E12 of the catalogue."""
    names = ["retention_mean", "reweighted_retention_mean", "pruned_retention_mean",
             "atom_retention_mean", "regmean_retention_mean", "optimum_gap"]  # fmt: skip
    table = features(made, names)
    given, weights, pruned, atoms, free = (table[n] for n in names[:5])
    assert (given <= weights + 1e-9).all() and (pruned <= atoms + 1e-9).all()
    assert (weights <= atoms + 1e-9).all()
    assert (atoms <= free + 5e-6).all()  # RegMean's ridge
    # Where no atom wants a negative weight, pruning is the best of atoms.
    for less, more in ((given, weights), (weights, atoms), (atoms, free)):
        assert (less < more - 1e-5).any()
    np.testing.assert_allclose(table["optimum_gap"], free - weights, atol=1e-12)


def test_harmful_atoms_do_the_others_more_harm_than_their_owner_good(made):
    table = features(made, ["harmful_energy_mean", "harmful_energy_max"])
    for s, who in enumerate(table.members):
        harmful, total = np.zeros(len(who)), np.zeros(len(who))
        for name in SIZES:
            atoms, blocks, _ = atom_system(made, who, name)
            for a, (owner, _) in enumerate(atoms):
                each = [(b[:, a] ** 2).sum() for b in blocks]
                total[owner] += each[owner]
                if sum(each) - each[owner] > each[owner]:
                    harmful[owner] += each[owner]
        found = table.per_member("harmful_energy")[s, : len(who)]
        np.testing.assert_allclose(found, harmful / total, atol=bound("sets"))
        assert table["harmful_energy_max"][s] == pytest.approx((harmful / total).max(), abs=1e-8)
    assert table["harmful_energy_max"][2] == 0  # alone, nobody is harmed
    assert table["harmful_energy_max"].max() > 0


def test_equal_adapters_lose_nothing_at_best(tmp_path, rng):
    made = Made(tmp_path, rng)
    twin = made.made[0]
    factors = {n: (m.a, m.b) for n, m in twin.modules.items()}
    make_adapter(tmp_path / "zoo" / f"{twin.path.name}z", {n: (*SIZES[n], 1) for n in factors},
                 factors=factors,
                 alphas={n: m.scale * len(m.a) for n, m in twin.modules.items()})  # fmt: skip
    made.zoo = open_zoo(tmp_path / "zoo")
    table = features(
        made, ["atom_retention_worst", "pruned_retention_worst", "regmean_retention_worst",
               "subspace_leverage_min", "minimax_retention_worst"],
        [[twin.path.name, f"{twin.path.name}z"]],
    )  # fmt: skip
    for name in set(table) - {"members", "size"}:
        assert table[name][0] == pytest.approx(1.0, abs=1e-6), name


# ---- predicted losses, from points


def with_points(made, *, gain=0.3, more=()):
    """Points, random but for every adapter's gain; ``more`` replaces tensors by name."""
    tensors = dict(more)
    for name in made.zoo.names:
        base = made.rng.uniform(1.0, 2.0, 6)
        tensors |= {f"base_loss.trained:{name}": base, f"loss.trained:{name}": base - gain}
    return make_points(made.calibration.path, list(made.zoo), made.domains, made.rng, sequences=6,
                       tensors=tensors).tensors  # fmt: skip


def loss_change(made, tensors, who, w, j, gain=0.3):
    """Text by text: dL_j(w) over the gain of the member at place j."""
    key = f"trained:{made.zoo.names[who[j]]}"
    step = np.array(w) - np.eye(len(who))[j]
    total = 0.0
    for s, tokens in enumerate(tensors[f"tokens.{key}"]):
        first = sum(step[a] * tensors[f"phi_data.{key}"][s, i] for a, i in enumerate(who))
        second = sum(step[a] * tensors[f"phi_model.{key}"][s, i] for a, i in enumerate(who))
        total += (first + tokens * second**2 / 2) / len(tensors[f"tokens.{key}"])
    return total / gain


@pytest.mark.parametrize("weights", [None, "one"])
def test_the_predicted_loss_is_the_quadratic_of_each_members_trained_point(made, weights):
    tensors = with_points(made)
    names = ["loss_change_worst", "loss_change_mean", "trusted_loss_change_worst",
             "trusted_loss_change_mean"]  # fmt: skip
    table = features(made, names, weights=weights)
    for s, who in enumerate(table.members):
        k = len(who)
        given = np.full(k, 1 / k) if weights is None else np.ones(k)
        best = table.per_member("trusted_weights")[s, :k]
        for prefix, w in (("", given), ("trusted_", best)):
            change = np.array([loss_change(made, tensors, who, w, j) for j in range(k)])
            assert table[f"{prefix}loss_change_worst"][s] == pytest.approx(change.max(), abs=1e-8)
            assert table[f"{prefix}loss_change_mean"][s] == pytest.approx(change.mean(), abs=1e-8)


def test_trusted_weights_are_the_best_within_their_ball(made):
    tensors = with_points(made)
    table = features(made, ["trusted_loss_change_mean"])
    on_the_edge = 0
    for s, who in enumerate(table.members):
        k = len(who)
        given = np.full(k, 1 / k)
        radius = TRUST * np.linalg.norm(given)
        w = table.per_member("trusted_weights")[s, :k]
        far = np.linalg.norm(w - given)
        assert far <= radius * (1 + 1e-9)
        on_the_edge += far > radius * (1 - 1e-6)

        def mean(w, who=who, k=k):
            return np.mean([loss_change(made, tensors, who, w, j) for j in range(k)])

        def room(w, given=given, radius=radius):
            return radius**2 - (w - given) @ (w - given)

        solved = minimize(
            mean, given, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
            constraints={"type": "ineq", "fun": room},
        )  # fmt: skip
        assert table["trusted_loss_change_mean"][s] <= solved.fun + 1e-7
        assert table["trusted_loss_change_mean"][s] == pytest.approx(mean(w), abs=1e-8)
    assert on_the_edge


@pytest.mark.parametrize("curved", [False, True])
def test_without_curvature_the_ball_alone_ends_the_step(made, curved):
    flat = {f"phi_model.trained:{n}": np.zeros((6, len(made.zoo))) for n in made.zoo.names}
    for phi in flat.values() if curved else ():  # along one adapter only
        phi[:, 0] = made.rng.standard_normal(6)
    with_points(made, more=flat)
    table = features(made, ["trusted_loss_change_mean", "loss_change_mean"], [[0, 1, 2]])
    w = table.per_member("trusted_weights")[0]
    assert np.linalg.norm(w - 1 / 3) == pytest.approx(TRUST / 3**0.5, rel=1e-9)
    assert table["trusted_loss_change_mean"][0] < table["loss_change_mean"][0]


def test_members_without_a_gain_or_a_point_have_no_predicted_loss(made):
    with_points(made, gain=-0.1)
    table = features(made, ["loss_change_mean", "trusted_loss_change_mean"])
    assert np.isnan(table["loss_change_mean"]).all()
    for file in made.calibration.path.glob("points*"):
        file.unlink()
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng,
                trained=["math-a", "code-a"])  # fmt: skip
    sets = [["math-a", "code-a"], ["math-a", "law-a"]]
    found = features(made, ["loss_change_mean"], sets).per_member("loss_change")
    assert np.isnan(found[1, 1])


def test_points_of_another_adapter_or_domain_are_refused(made):
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng,
                fingerprints={"code-a": "f" * 64})  # fmt: skip
    with pytest.raises(InputError, match="code-a"):
        features(made, ["loss_change_mean"])
    for file in made.calibration.path.glob("points*"):
        file.unlink()
    make_points(made.calibration.path, list(made.zoo), made.domains, made.rng)
    with pytest.raises(InputError, match="domain"):
        features(made, ["loss_change_mean"], [["math-a", "code-a"]],
                 domains={"math-a": "law"})  # fmt: skip
