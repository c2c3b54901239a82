"""Merges from factors with ``device="cuda"``, every method, against the CPU's."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="the device runs torch")
pytest.importorskip("triton", reason="triton is not installed")

from adapters import make_adapter
from calibration_samples import make_calibration
from dense_merge import WIDE, seed_from, subset
from device_merge_child import merge, solve, there
from tolerances import device_merge_bound

import mergeprobe_fast as mpf
from mergeprobe_fast.ops.tiles_reference import counter_hash

DOMAINS = ("math", "code", "law")
RECIPES = (
    {"modules": WIDE, "rank": 2, "alpha": 3},
    {"modules": WIDE, "rank": 5, "alpha": 16, "rslora": True, "dtype": "BF16"},
    {"modules": subset("head", "layers.1.q_proj", of=WIDE), "ranks": {"head": 1}, "alpha": 6},
)
# Rules on entries are in test_device_merge.py; one that sums into Fisher's is here.
CASES = {
    "svd": {},
    "linear": {"weights": [0.5, -0.75, 1.25]},
    "cat": {},
    "regmean": {},
    "regmean, plain": {"truncation": "plain", "absent": "skip", "off_diagonal": 0.5},
    "regmean, diagonal": {"off_diagonal": 0.0},
    "weighted_svd": {"off_diagonal": 1.0, "ridge": 1e-3},
    "osrm": {"directions": 3},
    "osrm, a share": {"share": 0.5},
    "prune": {"off_diagonal": 0.9},
    "prune, harmful": {"threshold": 1.0, "relative": False},
    "slerp": {"t": 0.3},
    "karcher": {},
    "tsv_m": {"keep": 0.6},
    "iso_c": {},
    "core_space": {},
    "core_space, dare": {"rule": "dare_ties", "density": [0.0, 0.6, 1.0]},
    "core_space, tsv": {"rule": "tsv", "weights": [1, 0, 2]},
    "core_space, isotropic": {"rule": "mean", "isotropic": True},
    "knots": {"density": [0.3, 0.0, 1.0], "weights": [1, 2, 3]},
    "knots, dare": {"rule": "dare_ties", "density": 0.5, "seed": 7},
    "lora_lego": {},
}


@pytest.fixture(scope="module")
def on_device():
    with there() as call:
        yield call


@pytest.fixture
def zoo(tmp_path, rng):
    """Ragged ranks, rsLoRA, bf16 beside float32, a missing module; and a calibration."""
    seed = seed_from(rng)
    made = [
        make_adapter(tmp_path / f"{domain}-{i}", **{"seed": seed + i, **RECIPES[i]})
        for i, domain in enumerate(DOMAINS)
    ]
    sizes = {name: size[:2] for name, size in WIDE.items()}
    # Fewer samples than inputs in one domain, more in another: both ways to solve.
    calibration = make_calibration(
        tmp_path / "calibration", sizes, dict(zip(DOMAINS, (5, 9, 60), strict=True)), rng,
        gradients=True,
    )  # fmt: skip
    return [str(m.path) for m in made], str(calibration.path)


def near(x, y, limit):
    """Values of a report: whole numbers and texts the same, others to a share of their size."""
    if isinstance(y, dict):
        return set(x) == set(y) and all(near(x[k], y[k], limit) for k in y)
    if isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(near(p, q, limit) for p, q in zip(x, y, strict=True))
    if isinstance(y, float):
        return abs(x - y) <= limit * max(1.0, abs(y))
    return x == y


def off(found, want):
    """The largest difference, over what it may be; ranks and members must be the same."""
    assert "error" not in want and set(found["modules"]) == set(want["modules"])
    worst = 0.0
    for name, y in want["modules"].items():
        x, size = found["modules"][name], max(y["norm"], 1e-300)
        limit = device_merge_bound(max(y["before"], y["rank"]))
        assert [x[k] for k in ("rank", "before", "members")] == [
            y[k] for k in ("rank", "before", "members")
        ], name
        differences = np.linalg.norm(x["delta"] - y["delta"]), x["norm"] - y["norm"]
        worst = max(worst, *(abs(d) / size / limit for d in (*differences, x["lost"] - y["lost"])))
        assert near(x["details"], y["details"], 1e-6), (name, x["details"], y["details"])
    assert set(found["outputs"]) == set(want["outputs"])
    for column, y in want["outputs"].items():
        apart = np.abs(found["outputs"][column] - y).max() / np.abs(y).max()
        worst = max(worst, apart / device_merge_bound(64))
    return worst


@pytest.mark.parametrize("case", CASES)
def test_the_device_merges_as_the_cpu_does(on_device, zoo, case):
    paths, calibration = zoo
    method = case.partition(",")[0]
    declared = mpf.MERGE_METHODS[method]
    paths = paths[: declared.arity[1] or 3]
    options = {"calibration": calibration, **CASES[case]}
    for cut in ({}, {"rank": 3}, {"energy": 0.8}) if declared.takes_rank else ({},):
        got = on_device("merge", paths, method, **options, **cut)
        assert off(got, merge(paths, method, **options, **cut)) <= 1, cut


def test_fisher_merges_at_full_rank_as_the_cpu_does(on_device, tmp_path, rng):
    """At full rank nothing is cut, so that float32 entries are all that differs."""
    sizes = {"layers.0.q": (9, 12, 2), "layers.1.q": (7, 10, 2)}
    for i in range(2):
        kept = dict(list(sizes.items())[i:])
        make_adapter(tmp_path / DOMAINS[i], kept, seed=seed_from(rng), dtype=("F32", "BF16")[i])
    made = make_calibration(
        tmp_path / "calibration", {n: s[:2] for n, s in sizes.items()}, DOMAINS[:2], rng,
        samples=5, gradients=True,
    )  # fmt: skip
    arguments = [[str(tmp_path / d) for d in DOMAINS[:2]], "fisher"]
    options = {"calibration": str(made.path), "rank": 12}
    got, want = on_device("merge", *arguments, **options), merge(*arguments, **options)
    for name, y in want["modules"].items():
        # Chains of 5 terms in the weights, of 2 in the deltas, and a quotient of sums of both.
        apart = np.linalg.norm(got["modules"][name]["delta"] - y["delta"])
        assert apart <= 1e-5 * y["norm"] and y["norm"] > 0


@pytest.fixture
def tall(tmp_path, rng):
    """Stacks above 64 rows: independent, with a copy and a zero, and more rows than d_out."""
    sizes = {"layers.0.q": (88, 96, 12), "layers.1.q": (88, 96, 12), "layers.0.down": (40, 90, 12)}
    paths = []
    for i in range(8):
        options = {"zero_b": i == 6}
        if i == 7:
            first = paths[0][1]
            options["factors"] = {n: (m.a, m.b) for n, m in first.modules.items()}
        magnitude = float(10.0 ** rng.uniform(-2, 2)) if i != 7 else 1.0
        made = make_adapter(
            tmp_path / f"adapter-{i}", sizes, seed=seed_from(rng), magnitude=magnitude, **options
        )
        paths.append((str(made.path), made))
    return [path for path, _ in paths]


TALL = {
    "svd": {}, "linear": {"energy": 0.9}, "tsv_m": {}, "karcher": {}, "iso_c": {"rank": 5},
    "core_space": {"rule": "sum"}, "lora_lego": {},
}  # fmt: skip


@pytest.mark.parametrize("method", TALL)
def test_stacks_of_many_adapters(on_device, tall, method):
    for paths in (tall[:6], tall):  # nothing dependent but in "down"; a copy and a zero
        got = on_device("merge", paths, method, **TALL[method])
        assert off(got, merge(paths, method, **TALL[method])) <= 1, len(paths)


@pytest.mark.parametrize("fault", ["pivoted", "library", "short", "products"])
def test_faults_are_noticed(on_device, zoo, tall, fault):
    paths, calibration = zoo
    arguments: tuple = ([*paths], "regmean")
    options: dict = {"calibration": calibration, "rank": 3}
    if fault in ("pivoted", "library"):
        arguments, options = (tall if fault == "pivoted" else tall[:6], "linear"), {}
    if fault == "short":
        arguments, options = (paths, "tsv_m"), {}
    got = on_device("merge", *arguments, **options, fault=fault)
    want = merge(*arguments, **options)
    if fault in ("short", "products"):  # float32 on the way: below what float32 factors tell
        apart = [abs(got["modules"][n]["norm"] / m["norm"] - 1) for n, m in want["modules"].items()]
        assert max(apart) > 1e-11
    else:
        assert off(got, want) > 1
    sound = on_device("merge", *arguments, **options)
    assert off(sound, want) <= 1
    apart = [abs(sound["modules"][n]["norm"] / m["norm"] - 1) for n, m in want["modules"].items()]
    assert max(apart) < 1e-11


def test_an_iteration_that_does_not_converge_is_of_its_own_module(on_device, tall):
    """torch raises for a batch as a whole."""
    got = on_device("merge", tall[:6], "linear", fault="svd of many")
    assert off(got, merge(tall[:6], "linear")) <= 1
    got = on_device("merge", tall[:6], "linear", fault="svd")
    assert got["kind"] == "InputError" and "did not converge" in got["error"]


@pytest.mark.parametrize(("fault", "method"), [("memory", "svd"), ("in a thread", "regmean")])
def test_a_device_that_is_full_is_told_in_a_line(on_device, zoo, fault, method):
    paths, calibration = zoo
    got = on_device("merge", paths, method, calibration=calibration, fault=fault)
    assert got["kind"] == "BackendError" and "out of memory" in got["error"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on the way to a refusal
@pytest.mark.parametrize("weight", [1.5e308, 1e200, 1e-300, 0.0])
@pytest.mark.parametrize("method", ["linear", "tsv_m", "iso_c", "core_space", "lora_lego"])
def test_absurd_weights_end_as_they_do_on_the_cpu(on_device, zoo, method, weight):
    paths, _ = zoo
    options = {"weights": [weight] * 3}
    got, want = on_device("merge", paths, method, **options), merge(paths, method, **options)
    assert got.get("error") == want.get("error")
    if "error" not in want:
        assert weight == 0
        assert not any(m["delta"].any() for m in got["modules"].values())


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("method", ["svd", "karcher", "regmean", "fisher", "cat"])
def test_a_factor_that_is_not_finite_is_named(on_device, zoo, method, side):
    from safetensors.torch import load_file, save_file

    paths, calibration = zoo
    path = f"{paths[1]}/adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if side in k and "head" in k)
    tensors[key][0, 0] = math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    options = {"calibration": calibration} if mpf.MERGE_METHODS[method].data else {}
    got, want = on_device("merge", paths, method, **options), merge(paths, method, **options)
    assert got == want and key in want["error"] and path in want["error"]


def test_samples_that_are_singular_without_a_ridge_are_refused_alike(on_device):
    """All numbers are powers of two: 2^60 J + I is 2^60 J in float64, of rank one to the bit."""
    x = np.where(np.arange(16) % 3 == 0, 1.0, -1.0)[:, None] * np.ones((1, 8))
    for ridge in (2.0**-60, 2.0**-10):
        got, want = on_device("solve", x, ridge), solve(x, ridge, "cpu")
        if ridge == 2.0**-60:
            assert "ridge: too small" in want["error"] and got == want
        else:
            assert np.allclose(got["x"], want["x"], rtol=1e-9, atol=0) and want["x"].any()


def test_a_metric_that_was_singular_once_stays_so(on_device):
    """Modules share it: the second one must not solve with what is left of a factor."""
    x = np.where(np.arange(16) % 3 == 0, 1.0, -1.0)[:, None] * np.ones((1, 8))
    assert on_device("solve", x, 2.0**-60, again=True) == solve(x, 2.0**-60, "cpu", again=True)


def test_chance_is_that_of_the_cpu(on_device, rng):
    position = np.append(rng.integers(0, 2**32, 500), [0, 2**32 - 1])
    seed, stream = (int(x) for x in rng.integers(0, 2**63, 2, np.uint64))
    found = on_device("hashed", seed, stream, position)
    assert (found == counter_hash(seed, stream, position)).all()
    assert (found != on_device("hashed", seed, stream + 1, position)).any()
