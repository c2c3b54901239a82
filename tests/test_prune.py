"""Pruned atoms against dense non-negative least squares on outputs, and what users are told."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import make_adapter
from calibrations import make_calibration
from dense_merge import assert_peft_agrees, deltas, digests, truncated
from scipy.optimize import nnls
from set_zoo import SETS, SIZES, Made
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merges import merge_tables
from mergeprobe_fast.merging import source
from mergeprobe_fast.planning import plan
from mergeprobe_fast.planning.judge import PredictorJudge
from mergeprobe_fast.planning.judging import padded
from mergeprobe_fast.recorded import open_recorded

EVERYONE = [0, 1, 2, 3, 4]


@pytest.fixture
def made(tmp_path, rng):
    change = [{"dtype": "BF16"}, {}, {"rslora": True}, {"dtype": "F16"}, {"alpha": 3}]
    return Made(tmp_path, rng, change=change)


def prune(made, who=EVERYONE, weights=None, rank=None, **arguments):
    arguments = {"domains": [made.domains[i] for i in who], "dtype": "F32",
                 "calibration": made.calibration.path, **arguments}  # fmt: skip
    zoo = mpf.Zoo([made.zoo[i] for i in who], same_base=True)
    return mpf.merge(zoo, "prune", weights, rank, **arguments)


@dataclass
class Truth:
    """One module: what every atom does to the inputs of each member, all materialised."""

    atoms: list  # (place of the owner, delta)
    blocks: list  # per member (outputs, atoms), over the root of the member's whole energy
    z: np.ndarray = None

    @property
    def owner(self):
        return np.array([owner for owner, _ in self.atoms], int)

    def target(self, i):
        return self.blocks[i][:, self.owner == i].sum(axis=1)

    def solve(self, lam, threshold=0.0, solver=nnls):
        each = np.array([(b**2).sum(axis=0) for b in self.blocks]) * lam[:, None]
        own = each[self.owner, np.arange(len(self.atoms))]
        left = own >= threshold * (each.sum(axis=0) - own)
        self.z = np.zeros(len(self.atoms))
        if left.any():
            roots = np.sqrt(lam)
            rows = np.concatenate([r * b for r, b in zip(roots, self.blocks, strict=True)])
            target = np.concatenate([r * self.target(i) for i, r in enumerate(roots)])
            self.z[left] = solver(rows[:, left], target)[0]
        return self

    @property
    def merged(self):
        return sum(z * delta for z, (_, delta) in zip(self.z, self.atoms, strict=True))


def outputs(made, i, name, delta, off=1.0, raw=False):
    """On adapter i's domain: their squares sum to the energy, the diagonal's share beside them."""
    x = made.calibration.inputs[made.domains[i], name]
    moment = made.calibration.moments[made.domains[i], name]
    rows = [x @ delta.T * np.sqrt(off / len(x)), (delta * np.sqrt((1 - off) * moment)).T]
    return np.concatenate([r.ravel() for r in rows]) * np.sqrt(
        made.count(made.domains[i], name, raw)
    )


def dense(made, who=EVERYONE, weights=None, threshold=0.0, off=1.0, raw=False, solver=nnls):
    lam = np.ones(len(who)) if weights is None else np.asarray(weights, float)
    energy = [sum((outputs(made, i, n, made.delta(i, n), off, raw) ** 2).sum() for n in SIZES)
              for i in who]  # fmt: skip
    found = {}
    for name in SIZES:
        atoms = made.atoms(who, name)
        if not any(name in made.made[i].modules for i in who):
            continue
        blocks = [
            np.array([outputs(made, i, name, d, off, raw) for _, d in atoms]).T / np.sqrt(e)
            for i, e in zip(who, energy, strict=True)
        ]
        found[name] = Truth(atoms, blocks).solve(lam, threshold, solver)
    return found


def result(merged):
    return {m.module.name: m.b.astype(np.float64) @ m.a for m in merged.modules}


def close(merged, truth):
    ours = result(merged)
    assert set(ours) == set(truth)
    for name, t in truth.items():
        size = max(np.linalg.norm(delta) for _, delta in t.atoms)
        assert np.linalg.norm(ours[name] - t.merged) <= bound("pruned atoms") * size, name


@pytest.mark.parametrize("who", [EVERYONE, [0, 2, 4], [1, 3]], ids=str)
@pytest.mark.parametrize("off", [1.0, 0.5, 0.0])
def test_it_is_non_negative_least_squares_on_outputs(made, who, off):
    """Of ragged ranks and dtypes, one of which lacks a module."""
    weights = np.array([1.0, 2.5, 0.3, 1.7, 0.6])[: len(who)]
    merged = prune(made, who, weights, off_diagonal=off)
    truth = dense(made, who, weights, off=off)
    close(merged, truth)
    for m in merged.modules:
        t = truth[m.module.name]
        own = [place for place, i in enumerate(who) if m.module.name in made.made[i].modules]
        assert m.details["atoms"] == [np.count_nonzero(t.owner == i) for i in own]
        for place, kept in zip(own, m.details["atoms_kept"], strict=True):
            z = t.z[t.owner == place]
            assert np.count_nonzero(z > 1e-5) <= kept <= np.count_nonzero(z > 1e-12)
        assert m.norm == pytest.approx(np.linalg.norm(t.merged), rel=bound("pruned atoms"))
        assert m.truncation_error == pytest.approx(0, abs=1e-6 * m.norm)
        rank = np.linalg.matrix_rank(t.merged, tol=1e-6 * np.linalg.norm(t.merged))
        assert m.rank_before == len(m.a) == rank


def test_another_problem_would_show(made):
    """The planted faults."""
    weights = np.array([1.0, 2.5, 0.3, 1.7, 0.6])
    merged = prune(made, weights=weights)

    def free(rows, target):
        return np.linalg.lstsq(rows, target, rcond=1e-12)

    faults = [{"weights": weights * [1, 1.001, 1, 1, 1]}, {"off": 0.999}, {"raw": True},
              {"solver": free}, {"threshold": 0.7}]  # fmt: skip
    for fault in faults:
        with pytest.raises(AssertionError):
            close(merged, dense(made, **{"weights": weights, **fault}))
    close(merged, dense(made, weights=weights))
    other = {"math": "law", "law": "code", "code": "math"}
    with pytest.raises(AssertionError):
        close(prune(made, weights=weights, domains=[other[d] for d in made.domains]),
              dense(made, weights=weights))  # fmt: skip


def test_energies_as_they_are_where_asked_for_or_nothing_else_was_recorded(made, tmp_path, rng):
    close(prune(made, relative=False), dense(made, raw=True))
    old = Made(tmp_path / "old", rng, version=1)
    close(prune(old), dense(old))


@pytest.mark.parametrize("threshold", [0.5, 1.0, 4.0])
def test_what_is_worth_less_than_its_harm_is_dropped_first(made, threshold):
    merged, truth = prune(made, threshold=threshold), dense(made, threshold=threshold)
    close(merged, truth)
    kept = sum(sum(m.details["atoms_kept"]) for m in merged.modules)
    assert kept < sum(sum(m.details["atoms_kept"]) for m in prune(made).modules)


def test_any_harm_is_too_much_at_a_threshold_without_end(made):
    merged = prune(made, threshold=1e30)
    assert all(m.norm == 0 and sum(m.details["atoms_kept"]) == 0 for m in merged.modules)
    alone = prune(made, [2], threshold=1e30)  # nobody to harm
    close(alone, dense(made, [2]))
    assert all(m.details["atoms"] == m.details["atoms_kept"] for m in alone.modules)


def test_set_features_say_what_the_merge_leaves(made):
    names = ["pruned_retention_worst", "pruned_retention_mean", "atoms_kept"]
    table = mpf.set_features(made.zoo, SETS, features=names, calibration=made.calibration.path)
    for s, who in enumerate(table.members):
        merged = prune(made, who)
        matrices = result(merged)
        left = [1 - made.error(i, lambda n: matrices.get(n, 0.0)) for i in who]  # noqa: B023
        found = table.per_member("pruned_retention")[s, : len(who)]
        np.testing.assert_allclose(found, left, atol=bound("pruned atoms"))
        assert table["pruned_retention_worst"][s] == pytest.approx(min(left), abs=1e-6)
        count, kept = (sum(sum(m.details[k]) for m in merged.modules)
                       for k in ("atoms", "atoms_kept"))  # fmt: skip
        assert table["atoms_kept"][s] == kept / count
    off = prune(made, table.members[0], off_diagonal=0.9)
    left = [1 - made.error(i, result(off).get) for i in table.members[0]]
    assert np.abs(left - table.per_member("pruned_retention")[0, :3]).max() > 1e-5


def turned(made, i, folder, gauge):
    """Adapter i with its factors in another gauge, scale kept."""
    m = made.made[i].modules
    factors = {n: (gauge @ f.a, f.b @ np.linalg.inv(gauge)) for n, f in m.items()}
    alphas = {n: f.scale * len(f.a) for n, f in m.items()}
    return make_adapter(folder, {n: (*SIZES[n], 1) for n in m}, factors=factors, alphas=alphas)


def test_the_gauge_does_not_matter(made, tmp_path, rng):
    rank = len(made.made[1].modules["layers.0.q"].a)
    before = prune(made)
    for gauge in (np.eye(rank) * 2.0**20, np.linalg.qr(rng.standard_normal((rank, rank)))[0]):
        folder = tmp_path / f"turned{gauge[0, 0]:g}" / made.zoo.names[1]
        paths = [a.path for a in made.zoo]
        paths[1] = turned(made, 1, folder, gauge).path
        after = mpf.merge(mpf.open_zoo(paths), "prune", calibration=made.calibration.path,
                          dtype="F32")  # fmt: skip
        for name, one in result(before).items():
            # The turned factors were rounded to float32 once more.
            difference = np.linalg.norm(result(after)[name] - one)
            assert difference <= bound("pruned atoms") * np.linalg.norm(one)


def test_the_order_and_the_chunks_do_not_matter(made, monkeypatch, tmp_path):
    first = prune(made)
    for order in ([4, 2, 0, 3, 1], [1, 0, 4, 3, 2]):
        for name, matrix in result(prune(made, order)).items():
            one = result(first)[name]
            assert np.linalg.norm(matrix - one) <= bound("pruned atoms") * np.linalg.norm(one)
    first.save(tmp_path / "whole")
    monkeypatch.setattr(source, "_CHUNK_BYTES", 1)
    prune(made).save(tmp_path / "pieces")
    assert digests(tmp_path / "whole") == digests(tmp_path / "pieces")


def test_one_adapter_and_equal_adapters_stay_what_they_are(made, tmp_path):
    twin = turned(made, 0, tmp_path / "zoo" / "math-z",
                  np.eye(len(made.made[0].modules["layers.0.q"].a)))  # fmt: skip
    made.zoo = mpf.open_zoo([*(a.path for a in made.zoo), twin.path])
    made.domains, made.made = [*made.domains, "math"], [*made.made, twin]
    for who, weights in (([0], None), ([0, 5], None), ([5, 0], [3.0, 1.0])):
        merged = prune(made, who, weights)
        for name, matrix in result(merged).items():
            truth = made.delta(0, name)
            assert np.linalg.norm(matrix - truth) <= 1e-6 * np.linalg.norm(truth)
        for m in merged.modules:
            assert len(m.a) == m.rank_before == m.details["atoms"][0]


def test_an_adapter_that_is_zero_takes_no_part(tmp_path, rng):
    """Everywhere, or on all of its own inputs; in one module only it holds the result down."""
    made = Made(tmp_path, rng, change=[{}, {}, {"zero_b": True}, {"zero_b": ("layers.0.q",)}, {}])
    zero = made.zoo.names.index("code-a")
    others = [i for i in EVERYONE if i != zero]
    merged = prune(made)
    close(merged, dense(made, others))
    place = list(merged.modules[0].members).index("code-a")
    assert [m.details["atoms"][place] for m in merged.modules if "code-a" in m.members] == [0] * 3
    nothing = prune(made, [zero])
    assert all(m.norm == 0 and m.details == {"atoms": [0], "atoms_kept": [0]}
               for m in nothing.modules)  # fmt: skip


def halves(folder, rng, recipes):
    """Adapters of one module (9, 12) from rows of v; inputs of a in dims 0-5, of b in 6-10.

    No two atoms write the same outputs: each one helps its owner or nobody.
    """
    zoo, free = [], np.linalg.qr(rng.standard_normal((9, 9)))[0]
    for name, right in recipes.items():
        left, free = free[:, : len(right)] * np.arange(len(right), 0, -1), free[:, len(right) :]
        zoo.append(make_adapter(folder / name, factors={"q": (np.array(right), left)},
                                modules={"q": (9, 12, 1)}, alpha=len(right)))  # fmt: skip
    x = {("a", "q"): np.zeros((30, 12)), ("b", "q"): np.zeros((20, 12))}
    x["a", "q"][:, :6] = rng.standard_normal((30, 6))
    x["b", "q"][:, 6:11] = rng.standard_normal((20, 5))
    calibration = make_calibration(folder / "cal", {"q": (9, 12)}, {"a": 30, "b": 20}, rng,
                                   samples=x)  # fmt: skip
    return zoo, calibration


def test_atoms_that_only_harm_or_that_nothing_excites_are_left_out(tmp_path, rng):
    e = np.eye(12)
    zoo, calibration = halves(tmp_path, rng, {"a": [e[1], e[7], e[11]], "b": [e[8], e[9]]})
    merged = mpf.merge([m.path for m in zoo], "prune", calibration=calibration.path)
    (m,) = merged.modules
    assert m.details == {"atoms": [3, 2], "atoms_kept": [1, 2]} and len(m.a) == m.rank_before == 3
    a, b = (made.modules["q"] for made in zoo)
    kept = a.b[:, :1] @ a.a[:1] + b.delta
    assert np.linalg.norm(result(merged)["q"] - kept) <= 1e-6 * np.linalg.norm(kept)


def test_an_adapter_that_its_own_inputs_do_not_see_takes_no_part(tmp_path, rng):
    e = np.eye(12)
    zoo, calibration = halves(tmp_path, rng, {"a": [e[7]], "b": [e[8], e[9]]})
    merged = mpf.merge([m.path for m in zoo], "prune", calibration=calibration.path)
    truth = zoo[1].modules["q"].delta
    assert np.linalg.norm(result(merged)["q"] - truth) <= 1e-6 * np.linalg.norm(truth)


def test_factors_of_too_much_rank_have_as_many_atoms_as_the_delta(tmp_path, rng):
    u, v = rng.standard_normal((9, 2)), rng.standard_normal((2, 12))
    a, b = np.concatenate([v, v, v[:1]]), np.concatenate([u, u, u[:, :1]], axis=1)
    made = make_adapter(tmp_path / "a", modules={"q": (9, 12, 5)}, factors={"q": (a, b)})
    other = make_adapter(tmp_path / "b", modules={"q": (9, 12, 3)}, seed=1)
    calibration = make_calibration(tmp_path / "cal", {"q": (9, 12)}, {"a": 30, "b": 1}, rng)
    one = mpf.merge([made.path], "prune", calibration=calibration.path).modules[0]
    assert one.details["atoms"] == [2] and len(one.a) == 2
    both = mpf.merge([made.path, other.path], "prune", calibration=calibration.path).modules[0]
    assert both.details["atoms"] == [2, 3] and len(both.a) <= 5


@pytest.mark.parametrize("shape", [(1, 12), (9, 1)], ids=str)
def test_modules_of_one_row_or_column_and_a_single_sample(tmp_path, rng, shape):
    zoo = [make_adapter(tmp_path / n, modules={"q": (*shape, 1)}, seed=i)
           for i, n in enumerate("ab")]  # fmt: skip
    calibration = make_calibration(tmp_path / "cal", {"q": shape}, {"a": 1, "b": 1}, rng)
    mpf.merge([m.path for m in zoo], "prune", calibration=calibration.path).save(tmp_path / "out")
    assert_peft_agrees(tmp_path / "out")


def test_a_rank_or_an_energy_cuts_what_is_left(made):
    whole = dense(made)
    for m in prune(made, rank=2).modules:
        matrix = whole[m.module.name].merged
        cut = truncated(matrix, 2)
        assert len(m.a) == 2
        assert m.truncation_error == pytest.approx(np.linalg.norm(matrix - cut), rel=1e-5)
        assert np.linalg.norm(m.b.astype(np.float64) @ m.a - cut) <= 1e-4 * np.linalg.norm(matrix)
    for m in prune(made, energy=0.8).modules:
        assert m.truncation_error**2 <= 0.2 * m.norm**2


def test_what_it_cannot_do_is_refused_by_name(made, tmp_path, rng):
    for weights in ([1, 1, -1, 1, 1], [1, 0, 1, 1, 1]):
        with pytest.raises(InputError, match="prune takes positive weights only") as caught:
            prune(made, weights=weights)
        assert caught.value.key == "weights"
    with pytest.raises(InputError, match="calibration: prune needs a calibration"):
        mpf.merge(made.zoo, "prune")
    for bad in ({"threshold": -1}, {"off_diagonal": 1.5}, {"ridge": 0}, {"relative": 1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            prune(made, **bad)
    silent = {("code", "layers.1.q"): np.zeros(12)}
    made.calibration = make_calibration(
        tmp_path / "silent", SIZES, dict.fromkeys(("math", "code", "law"), 9), rng,
        output_moments=silent,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"layers\.1\.q: the base module's outputs are zero"):
        prune(made)
    close(prune(made, relative=False), dense(made, raw=True))


class ByError:
    """A predictor that says 1 - E6."""

    def predict(self, columns, **_):
        kept = 1 - columns["error"]
        return SimpleNamespace(
            retention=kept, low=kept - 0.1, high=kept + 0.1, level="calibration", calibrated=True,
            outside=np.zeros(kept.shape, bool), coverage=0.9, reason="made",
        )  # fmt: skip


def test_the_judge_really_prunes_and_a_plan_writes_it(made, tmp_path):
    tables = merge_tables(made.zoo, open_recorded(made.zoo, made.calibration.path), threads=1)
    judge = PredictorJudge(tables, ByError())
    assert "prune" not in judge.unavailable
    sets = [(0, 1), (1, 2, 4), (0, 1, 2, 3, 4)]
    said = judge.judge(padded(sets), "prune").retention
    table = mpf.set_features(made.zoo, [list(s) for s in sets], calibration=made.calibration.path,
                             features=["pruned_retention_worst"])  # fmt: skip
    np.testing.assert_allclose(said, table.per_member("pruned_retention"), atol=1e-6)
    found = plan(made.zoo, calibration=made.calibration.path, model=ByError(),
                 actions=("prune", "route"), costs={"floor": 0.01, "worst": 0.0,
                                                    "average": 0.001})  # fmt: skip
    assert found.merged and {g.method for g in found.merged} == {"prune"}
    served = found.apply(tmp_path / "out")
    group = found.merged[0]
    who = [made.zoo.names.index(n) for n in group.members]
    written = next(r for r in served.residents if r.name == group.name)
    assert (written.action, written.method) == ("prune", "prune")
    close_to = prune(made, who, dtype=None)
    for name, delta in deltas(tmp_path / "out" / written.folder).items():
        one = result(close_to)[name]
        assert np.linalg.norm(delta - one) <= 2.0**-7 * np.linalg.norm(one), name
