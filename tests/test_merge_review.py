"""Faults that a review found in the merge commands, each once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from adapters import delta_of, make_adapter
from calibration_samples import make_calibration as gradients_too
from calibrations import make_calibration
from command_line import Run, assert_refused, runner, strict_json
from dense_merge import WIDE, digests, exact_sums, seed_from, truncated, zoo_of
from single_files import KOHYA, make_file

import mergeprobe_fast as mpf
from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.strict_yaml import parse_yaml
from mergeprobe_fast.merging import schedule
from mergeprobe_fast.merging import source as source_module
from mergeprobe_fast.merging.source import ZooSource, each_module
from mergeprobe_fast.zoo import Module

SIZES = {n: (o, i) for n, (o, i, _) in WIDE.items()}


@pytest.fixture
def cli(capsys) -> Run:
    return runner(capsys)


@pytest.fixture
def zoo(tmp_path) -> Path:
    for i, name in enumerate(("math-a", "code")):
        make_adapter(tmp_path / "zoo" / name, WIDE, seed=i)
    return tmp_path / "zoo"


@pytest.mark.parametrize("rule", [{"value": 0}, {"filter": "*", "value": 0}])
def test_one_rule_per_model_is_not_the_rule_of_all(cli, zoo, tmp_path, rule):
    models = [
        {"model": str(zoo / name), "parameters": {"weight": {**rule, "value": weight}}}
        for name, weight in (("math-a", 0.2), ("code", 0.8))
    ]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"models": models}))
    ran = cli("merge", "--config", tmp_path / "c.yaml", "--out", tmp_path / "o", "--json")
    assert [a["weight"] for a in strict_json(ran.out)["adapters"]] == [0.2, 0.8]


def test_a_single_file_and_its_report_appear_together_or_not(tmp_path, rng, monkeypatch):
    (tmp_path / "zoo").mkdir()
    paths = [tmp_path / "zoo" / f"{n}.safetensors" for n in "ab"]
    for i, path in enumerate(paths):
        make_file(path, KOHYA, seed=i)
    merged = mpf.merge(paths, "linear")
    out = tmp_path / "new.safetensors"
    merged.save(out)
    before = digests(tmp_path)

    def fail(self, written=None):
        raise InputError("the report failed")

    monkeypatch.setattr(type(merged), "report", fail)
    for path, overwrite in ((out, True), (tmp_path / "other.safetensors", False)):
        with pytest.raises(InputError, match="the report failed"):
            merged.save(path, overwrite=overwrite)
    assert digests(tmp_path) == before


def test_a_calibration_of_another_shape_is_found_before_any_work(tmp_path, zoo, rng):
    shapes = {**SIZES, "head": (21, 41)}
    cal = make_calibration(tmp_path / "cal", shapes, {"math": 3, "code": 3}, rng).path
    steps: list[int] = []
    with pytest.raises(InputError, match="head: is 21 x 41 in the calibration"):
        mpf.merge(zoo, "linear", calibration=cal, progress=steps.append)
    assert not steps


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "threads=2"], ["svd takes no argument 'threads'"]),
        (["--set", "progress=2"], ["svd takes no argument 'progress'"]),
        (["--set", "zoo=2"], ["svd takes no argument 'zoo'"]),
        (["--set", "rank=2"], ["rank: is no parameter of a method"]),
        (["--method", "ties", "--set", "density=0b_"], ["density: must be numbers, got '0b_'"]),
        (["--method", "dare_ties", "--set", "seed=2020-13-45"], ["seed: must be an integer"]),
        (["--method", "ties", "--set", "density=.1", "--set", "density=.9"], ["given twice"]),
        (["--method", "ties", "--set", "normalize=false"], ["normalize: means nothing in dialect"]),
    ],
)
@pytest.mark.parametrize("into", [False, True])
def test_no_word_on_the_command_line_makes_a_traceback(cli, zoo, tmp_path, words, parts, into):
    more = ["--into", tmp_path / "base"] if into and "set" in words[0] else []
    assert_refused(cli("merge", zoo, *words, *more, "--out", tmp_path / "o"), *parts)


@pytest.mark.parametrize("method", sorted(mpf.MERGE_METHODS))
def test_every_default_can_be_said(cli, method, tmp_path, zoo):
    """As ``methods`` prints it, --set takes it: 1e-06 too."""
    for name, argument in mpf.MERGE_METHODS[method].arguments.items():
        value = parse_yaml(str(argument.default)) if argument.default is not None else None
        if isinstance(argument.default, bool):
            value = parse_yaml(str(argument.default).lower())
        assert value == argument.default and type(value) is type(argument.default), name


def test_yaml_is_what_people_mean():
    found = parse_yaml("a: 1e-6\nb: 2020-13-40\nc: 012\nd: yes\ne: [1.5, -3, .5, 2E3, null, true]")
    numbers = [1.5, -3, 0.5, 2000.0, None, True]
    assert found == {"a": 1e-6, "b": "2020-13-40", "c": 12, "d": "yes", "e": numbers}
    for text, reason in (("a: 1\nb: 2\na: 3", "'a' stands twice"), ("\0", "special characters"),
                         ("a: !!python/name:os.system", "could not determine"),
                         ("a: *b", "undefined alias")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            parse_yaml(text)


def test_energy_of_an_output_is_not_called_short(tmp_path, zoo, rng):
    cal = make_calibration(tmp_path / "cal", SIZES, {"math": 40, "code": 40}, rng).path
    for method in ("weighted_svd", "regmean"):
        report = mpf.merge(zoo, method, energy=0.9, calibration=cal).save(tmp_path / method)
        kept = [1 - m["activation_error_relative"] ** 2 for m in report["modules"].values()]
        assert min(kept) >= 0.9 - 1e-9
        assert not any("keep less" in note for note in report["notes"])


def test_gradients_run_over_numbered_layers_only():
    names = ["embed_tokens", "layers.0.q", "layers.1.q", "layers.2.q", "lm_head"]
    modules = [Module(n, "embedding" if n[0] == "e" else "linear", 4, 4) for n in names]
    np.testing.assert_array_equal(schedule.column([0, 1], modules, "w"), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("method", ["regmean", "weighted_svd", "osrm", "linear", "ties", "knots"])
def test_small_chunks_give_the_same(tmp_path, zoo, rng, method, monkeypatch):
    """Buffers are used again for every chunk: nothing may be read after it is given back."""
    arguments = {}
    if mpf.MERGE_METHODS[method].data:
        made = make_calibration(tmp_path / "cal", SIZES, {"math": 9, "code": 9}, rng)
        arguments = {"calibration": made.path}
    whole = mpf.merge(zoo, method, **arguments)
    monkeypatch.setattr(source_module, "_CHUNK_BYTES", 1)
    pieces = mpf.merge(zoo, method, **arguments)
    for one, other in zip(whole.modules, pieces.modules, strict=True):
        assert one.a.tobytes() == other.a.tobytes() and one.b.tobytes() == other.b.tobytes()


def test_modules_side_by_side_keep_their_order_and_raise_the_first_error(zoo):
    source = ZooSource(mpf.open_zoo(zoo))
    names = [m.name for m in source.modules]
    for threads in (1, 2, 5):
        found = each_module(source.chunks(threads), lambda m: m.module.name, threads)
        assert list(found) == names
    lines: dict[str, set[int]] = {}

    def note(m):
        lines.setdefault(m.module.layer, set()).add(threading.get_ident())

    list(each_module(source.chunks(2), note, 3, lambda m: m.module.layer))
    assert all(len(threads) == 1 for threads in lines.values())

    def fail(m):
        raise InputError("no", key=m.module.name)

    with pytest.raises(InputError, match=f"{names[0]}: no"):
        list(each_module(source.chunks(2), fail, 2))


def test_overlapping_calls_give_the_blas_back():
    from threadpoolctl import threadpool_info, threadpool_limits

    def pools() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    with threadpool_limits(2, user_api="blas"):
        before = pools()
        one, other = _env.one_blas_thread(), _env.one_blas_thread()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert set(pools()) == {1}, "the other one is still at work"
        other.__exit__(None, None, None)
        assert pools() == before


@pytest.mark.parametrize("method", ["iso_c", "core_space"])
def test_an_overflow_is_no_zero(tmp_path, method):
    made = zoo_of(*[{"modules": WIDE, "magnitude": 1e37}] * 2)(tmp_path, 0)
    arguments = {"isotropic": True} if method == "core_space" else {}
    with pytest.raises(InputError, match="overflow"):
        mpf.merge([m.path for m in made], method, [100, 100], **arguments)


# Of rules that average with weights, only their ratios count.
RATIOS = {"slerp", "karcher", "regmean", "prune", "fisher"}
SUMS = {"svd", "linear", "weighted_svd", "osrm", "tsv_m", "iso_c", "core_space", "knots",
        "lora_lego"}  # fmt: skip


@pytest.mark.parametrize("method", sorted(RATIOS | SUMS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on the way to a refusal
def test_absurd_weights_are_ratios_or_refused(tmp_path, rng, method):
    """Neither zeros nor a traceback, where sums and squares of weights leave float64."""
    shapes = {n: s[:2] for n, s in WIDE.items()}
    made = zoo_of(*[{"modules": WIDE}] * 2)(tmp_path / "zoo", seed_from(rng))
    given = {"calibration": gradients_too(
        tmp_path / "calibration", shapes, {"a": 5, "b": 60}, rng, gradients=True
    ).path, "domains": ["a", "b"]} if mpf.MERGE_METHODS[method].data else {}  # fmt: skip

    def deltas(weight):
        found = mpf.merge([m.path for m in made], method, [weight, 0.75 * weight], **given)
        return [m.b.astype(np.float64) @ m.a for m in found.modules]

    wanted = deltas(1.0)
    for weight in (1.5e308, 1e200, 1e-200, 1e-300):
        if method in RATIOS:
            for x, y in zip(deltas(weight), wanted, strict=True):
                assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y), weight
        else:
            said = "overflows|NaN or infinite" if weight > 1 else "underflows"
            with pytest.raises(InputError, match=said):
                deltas(weight)


def test_notes_say_what_is_so(tmp_path, rng):
    made = zoo_of(*[{"modules": WIDE, "seed": 3}] * 2)(tmp_path / "zoo", 0)
    paths = [m.path for m in made]
    zero = zoo_of(*[{"modules": WIDE, "zero_b": True}] * 2)(tmp_path / "zero", 0)
    for method in ("svd", "cat", "ties", "magnitude_prune"):
        report = mpf.merge([m.path for m in zero], method).report()
        assert any("the merged update is zero" in note for note in report["notes"]), method
    cal = make_calibration(tmp_path / "cal", SIZES, {"x": 40}, rng).path
    data = {"calibration": cal, "domains": ["x", "x"]}
    report = mpf.merge(paths, "regmean", **data).report()
    assert not any("padded" in note for note in report["notes"]), "B is kept whole"
    report = mpf.merge(paths, "svd", rank=9).report()
    assert any("padded with zeros to 9" in note for note in report["notes"])
    cancelled = mpf.merge(paths, "weighted_svd", [1, -1], **data)
    assert {m.rank_before for m in cancelled.modules} == {0}


@pytest.mark.parametrize("size", [2.0**-90, 2.0**-70, 2.0**60, 2.0**80])
def test_entrywise_rules_at_extreme_scales(tmp_path, rng, size):
    """Wide enough for the range finder: what it multiplies must stay in float32's range."""
    shapes = {"m": (96, 120, 4)}
    seed = seed_from(rng)
    plain = zoo_of(*[{"modules": shapes}] * 2)(tmp_path / "plain", seed)
    far = zoo_of(*[{"modules": shapes, "magnitude": size}] * 2)(tmp_path / "far", seed)
    wanted = mpf.merge([m.path for m in plain], "magnitude_prune", [1, 1], density=0.5).modules[0]
    found = mpf.merge([m.path for m in far], "magnitude_prune", [1, 1], density=0.5).modules[0]
    one, other = (m.b.astype(np.float64) @ m.a for m in (wanted, found))
    assert np.linalg.norm(other / size - one) <= 1e-3 * np.linalg.norm(one)
    assert abs(found.truncation_error / size / wanted.truncation_error - 1) < 1e-3
    whole = mpf.merge([m.path for m in far], "magnitude_prune", [1, 1], 4, density=1).modules[0]
    truth = exact_sums(far, [1, 1])["m"]
    best = np.linalg.norm(truth - truncated(truth, 4))
    assert abs(whole.truncation_error / best - 1) < 1e-4


def test_an_overflow_names_its_module(tmp_path):
    made = zoo_of(*[{"modules": WIDE, "magnitude": 1e37, "alpha": 1e6}] * 2)(tmp_path, 0)
    for method in ("ties", "dare_linear", "svd"):
        with pytest.raises(InputError, match=r"^(head|layers\.\d+\.q_proj): .*overflow"):
            mpf.merge([m.path for m in made], method)


def test_a_file_is_described_as_a_file(cli, tmp_path):
    (tmp_path / "zoo").mkdir()
    path = make_file(tmp_path / "zoo" / "a.safetensors", KOHYA).path
    ran = cli("merge", path, "--out", tmp_path / "m.safetensors")
    assert "m.merge.json" in ran.out and "PEFT" not in ran.out
    assert delta_of(next(iter(mpf.open_zoo(tmp_path / "m.safetensors")[0].modules.values()))).any()
