"""Probe folders: what was recorded is read, and nothing else is."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters import make_adapter
from probes import MadeRun, MadeSnapshot, make_run, make_snapshot
from tolerances import bound

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import probe, probe_json, safetensors
from mergeprobe_fast.io.dtypes import bf16_to_f32, f32_to_bf16
from mergeprobe_fast.io.probe import open_probe, open_run

Q, DOWN = "layers.0.q", "layers.10.down"
MODULES = {Q: (6, 5, 2), DOWN: (5, 7, 3)}


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> MadeRun:
    return make_run(tmp_path / "runs" / "math", rng, MODULES)


@pytest.fixture
def made(run: MadeRun) -> MadeSnapshot:
    return run.snapshots[-1]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_what_was_written_is_read(tmp_path, rng, dtype):
    made = make_run(tmp_path / "math", rng, MODULES, dtype=dtype, alpha=3).snapshots[-1]
    snapshot = open_probe(made.path)
    assert snapshot.info == made.info and snapshot.before is None
    assert (snapshot.steps, snapshot.fraction, snapshot.too_early) == (10, 0.1, False)
    assert snapshot.adapter.name == "math" and list(snapshot.adapter.modules) == sorted(MODULES)
    assert repr(snapshot) == "<Snapshot of 'math' after 10 of 100 steps>"
    for name, m in made.adapter.modules.items():
        a, b = snapshot.factors(name)
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, m.a)
        np.testing.assert_array_equal(b, m.b)
        for which, g in (("mean", made.mean(name)), ("last", made.gradients[name][-1])):
            d_a, d_b = snapshot.gradients(name, which)
            assert d_a.dtype == d_b.dtype == np.float32
            np.testing.assert_allclose(d_a, m.scale * m.b.T @ g, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(d_b, m.scale * g @ m.a.T, rtol=1e-6, atol=1e-9)
        along = np.mean([(g * m.delta).sum() for g in made.gradients[name]])
        for which in ("euler_a", "euler_b"):
            assert snapshot.values(which)[name] == pytest.approx(along)
    snapshot.check()


def test_embeddings_and_convolutions_are_read_flat(tmp_path, rng):
    shapes = {"wte": (6, 11, 2), "conv": (5, 12, 3)}
    factors = {
        n: (rng.standard_normal((r, i)), rng.standard_normal((o, r)))
        for n, (o, i, r) in shapes.items()
    }
    gradients = {n: [rng.standard_normal((o, i))] for n, (o, i, _) in shapes.items()}
    kinds = {"embeddings": ("wte",), "convs": {"conv": (3, 2, 2)}}
    made = make_snapshot(tmp_path / "s", factors, gradients, kinds=kinds)
    snapshot = open_probe(made.path)
    for name, m in made.adapter.modules.items():
        for found, true in zip(snapshot.factors(name), (m.a, m.b), strict=True):
            np.testing.assert_array_equal(found, true)
        assert [g.shape for g in snapshot.gradients(name)] == [m.a.shape, m.b.shape]
    snapshot.check()


def test_json_goes_both_ways(made, run):
    cases = [
        made.info,
        replace(made.info, loss=None, clip=None, learning_rate=None, learning_rate_integral=None,
                initial=None, optimizer=None, dtype=None, run="math", base_model=None),
        replace(made.info, learning_rate_groups={"A": 1e-4, "B": 0.0}, loss_scale=65536.0,
                skipped_steps=2, notes=("one",), fractions=(0.05, 0.1)),
    ]  # fmt: skip
    for info in cases:
        text = json.dumps(probe_json.probe_to_json(info), allow_nan=False)
        assert probe_json.parse_probe(json.loads(text)) == info
    saved = (probe_json.Saved(7, 0.5), probe_json.Saved(9, None))
    for info in (run.info, replace(run.info, name="math", initial=None, saved=saved)):
        assert probe_json.parse_run(json.loads(json.dumps(probe_json.run_to_json(info)))) == info


def test_a_loss_that_was_not_finite_is_null_in_the_file_and_nan_here(made):
    info = replace(made.info, loss=probe_json.Loss(math.nan, math.inf, 3))
    value = probe_json.probe_to_json(info)
    assert value["loss"] == {"mean": None, "last": None, "count": 3}
    loss = probe_json.parse_probe(value).loss
    assert math.isnan(loss.mean) and math.isnan(loss.last) and loss.count == 3


def edit(path: Path, where: tuple[str | int, ...], value: object = ...) -> None:
    """Set, or with no value delete, one field of a JSON file."""
    fields = json.loads(path.read_text())
    at = fields
    for key in where[:-1]:
        at = at[key]
    if value is ...:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    path.write_text(json.dumps(fields))


BAD_PROBE = [
    (("format",), "other", "format: is not 'mergeprobe-probe'"),
    (("version",), 2, "version: is 2, this program reads 1"),
    (("version",), True, "version: is True, this program reads 1"),
    (("extra",), 1, "extra: is not a field of this format"),
    (("steps",), ..., "steps: is missing"),
    (("steps",), 0, "steps: is not an integer from 1"),
    (("steps",), 10.0, "steps: is not an integer from 1"),
    (("steps",), 101, "steps: is beyond total_steps, which is 100"),
    (("steps",), 9, "window"),  # with window 11, below
    (("too_early",), True, "too_early: is not whether there were fewer than 5 steps"),
    (("too_early",), 0, "too_early: is neither true nor false"),
    (("window",), 12, "window: is more than the 11 steps that were seen"),
    (("fractions",), [], "fractions: is empty"),
    (("fractions",), [0.1, 0.05], "fractions: is not in ascending order"),
    (("fractions",), [0.1, 0.1], "fractions: is not in ascending order"),
    (("fractions",), [1.5], "fractions: has a fraction above 1"),
    (("fractions", 0), 0, r"fractions\[0\]: is not above 0"),
    (("fractions", 0), "x", r"fractions\[0\]: is not a finite number"),
    (("micro_batches",), 0.5, "micro_batches: is below 1"),
    (("loss", "mean"), "low", "loss.mean: is not a finite number"),
    (("loss", "count"), ..., "loss.count: is missing"),
    (("loss",), [], "loss: is not an object"),
    (("learning_rate",), -1, "learning_rate: is negative"),
    (("learning_rate_integral",), True, "learning_rate_integral: is not a finite number"),
    (("learning_rate_groups",), {"A": 1}, "learning_rate_groups.B: is missing"),
    (("clip", "min"), 1.5, "clip.min: is not from 0 to 1"),
    (("loss_scale",), 0, "loss_scale: is not above 0"),
    (("skipped_steps",), -1, "skipped_steps: is not an integer from 0"),
    (("optimizer",), "", "optimizer: is not a text"),
    (("dtype",), "F64", "dtype: is none of F32, BF16, F16"),
    (("dtype",), "BF16", "dtype: is BF16, layers.0.q is not"),
    (("base_model",), "other", "base_model: is 'other', the adapter's is 'test/base'"),
    (("modules",), [Q, Q], "modules: names a module twice"),
    (("modules",), [Q, DOWN, "x"], "initial.modules.x: is missing"),
    (("modules",), [Q], f"initial.modules.{DOWN}: is no module of this probe"),
    (("initial", "sha256"), "ab", "initial.sha256: is not 64 hexadecimal digits"),
    (("initial", "modules", Q), "A" * 16, f"initial.modules.{Q}: is not 16 hexadecimal digits"),
    (("notes",), "note", "notes: is not a list"),
    (("notes",), [1], r"notes\[0\]: is not a text"),
]


@pytest.mark.parametrize(("where", "value", "reason"), BAD_PROBE)
def test_a_bad_field_of_a_snapshot_is_named(made, where, value, reason):
    if reason == "window":
        edit(made.path / "probe.json", ("window",), 11)
    edit(made.path / "probe.json", where, value)
    with pytest.raises(InputError, match=rf"step-0000010/probe.json: {reason}"):
        open_probe(made.path)


def test_modules_other_than_the_adapters_are_refused(made):
    file = made.path / "probe.json"
    edit(file, ("initial",), None)
    edit(file, ("modules",), [Q, DOWN, "x"])
    with pytest.raises(InputError, match=r"probe.json: modules: a module is not in the adapter: x"):
        open_probe(made.path)
    edit(file, ("modules",), [Q])
    with pytest.raises(InputError, match=f"modules: a module is missing, .*: {DOWN}"):
        open_probe(made.path)


BAD_RUN = [
    (("format",), "mergeprobe-probe", "format: is not 'mergeprobe-run'"),
    (("version",), 2, "version: is 2"),
    (("planned",), [5], "planned: expected one for each of 2 fractions"),
    (("planned",), [10, 5], "planned: is not in ascending order"),
    (("planned",), [5, 101], "planned: has a step beyond total_steps"),
    (("saved",), [{"step": 5}], r"saved\[0\].learning_rate_integral: is missing"),
    (("saved",), [{"step": 101, "learning_rate_integral": 1}], "saved: has a step beyond"),
    (("name",), "", "name: is not a text"),
    (("fractions",), ..., "fractions: is missing"),
    (("more",), 1, "more: is not a field"),
]


@pytest.mark.parametrize(("where", "value", "reason"), BAD_RUN)
def test_a_bad_field_of_a_run_is_named(run, where, value, reason):
    edit(run.path / "run.json", where, value)
    with pytest.raises(InputError, match=rf"math/run.json: {reason}"):
        open_run(run.path)


STRANGERS = [
    (("total_steps",), 90, "total_steps: is not what run.json says"),
    (("run",), "other", "run: is not what run.json says"),
    (("steps",), 8, "steps: is 8, but the folder is called step-0000010"),
    (("fractions",), [0.2], "fractions: run.json has other steps for them"),
    (("initial", "modules", Q), "0" * 16, "initial: is not what run.json says"),
]


@pytest.mark.parametrize(("where", "value", "reason"), STRANGERS)
def test_a_snapshot_of_another_run_is_refused(run, made, where, value, reason):
    edit(made.path / "probe.json", where, value)
    with pytest.raises(InputError, match=f"step-0000010/probe.json: {reason}"):
        open_run(run.path)


def test_a_run_that_forgot_its_first_factors_may_be_continued(run, made):
    edit(made.path / "probe.json", ("initial",), None)
    assert open_run(run.path).snapshots[-1].info.initial is None


def test_snapshots_of_one_run_have_the_same_modules(run, made, rng):
    info = made.info
    shutil.rmtree(made.path)
    factors = {Q: (np.ones((3, 5)), np.ones((6, 3))), DOWN: (np.ones((3, 7)), np.ones((5, 3)))}
    gradients = {Q: [np.ones((6, 5))], DOWN: [np.ones((5, 7))]}
    make_snapshot(made.path, factors, gradients, initial=info.initial)
    with pytest.raises(InputError, match=r"step-0000010: layers.0.q: is not as in step-0000005"):
        open_run(run.path)


def rewrite(made: MadeSnapshot, **changes: object) -> None:
    """Replace, remove (None) or add tensors of gradients.safetensors."""
    path = made.path / "gradients.safetensors"
    tensors = {}
    for key, ref in safetensors.read_header(path).tensors.items():
        raw = path.read_bytes()[ref.offset : ref.offset + ref.nbytes]
        tensors[key] = np.frombuffer(raw, safetensors.STORAGE[ref.dtype]).reshape(ref.shape)
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    safetensors.write(path, {k: v for k, v in tensors.items() if v is not None})


FIRST = "last.A." + Q


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({FIRST: None}, f"{FIRST}: is missing"),
        ({"euler_b": None}, "euler_b: is missing"),
        ({"last.A.x": np.ones(1)}, "last.A.x: is not a tensor of this snapshot"),
        ({FIRST: np.ones((5, 2), "f4")}, rf"{FIRST}: is F32 \(5, 2\), not F32 \(2, 5\)"),
        ({FIRST: np.ones((2, 5))}, rf"{FIRST}: is F64 \(2, 5\), not F32 \(2, 5\)"),
        ({"euler_a": np.ones(3)}, r"euler_a: is F64 \(3,\), not F64 \(2,\)"),
    ],
)
def test_tensors_are_exactly_those_declared(made, tensors, reason):
    rewrite(made, **tensors)
    with pytest.raises(InputError, match=f"gradients.safetensors: {reason}"):
        open_probe(made.path)


def test_numbers_that_are_not_finite_are_refused_when_read(made):
    bad = np.ones((2, 5), np.float32)
    bad[1, 2] = np.nan
    rewrite(made, **{FIRST: bad, "mean.B." + Q: np.full((6, 2), np.inf, np.float32)})
    rewrite(made, euler_a=np.array([1, np.nan]), visible_square=np.array([1, -1.0]))
    snapshot = open_probe(made.path)
    for read, key in (
        (lambda: snapshot.gradients(Q, "last"), FIRST),
        (lambda: snapshot.gradients(Q), "mean.B." + Q),
        (lambda: snapshot.values("euler_a"), "euler_a"),
    ):
        with pytest.raises(InputError, match=rf"gradients.safetensors: {key}: has NaN or Inf"):
            read()
    with pytest.raises(InputError, match=r"visible_square: a mean of squares is negative"):
        snapshot.values("visible_square")
    with pytest.raises(InputError, match=r"euler_a"):
        snapshot.check()
    for read in (snapshot.gradients, snapshot.factors):
        with pytest.raises(InputError, match=r"step-0000010: x: has no such module"):
            read("x")
    for call in (lambda: snapshot.values("euler"), lambda: snapshot.gradients(Q, "first")):
        with pytest.raises(InputError, match=r"expected"):
            call()


def flip(path: Path, offset: int) -> None:
    """Invert one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0xFF
    path.write_bytes(raw)


def test_damaged_gradients_fail_the_euler_identity(made):
    path = made.path / "gradients.safetensors"
    whole = path.read_bytes()
    for key in (f"last.{side}.{name}" for side in "AB" for name in MODULES):
        ref = safetensors.read_header(path).tensors[key]
        name = key[7:]
        flip(path, ref.offset + 4 * (math.prod(ref.shape) // 2) + 3)  # sign and exponent
        with pytest.raises(InputError, match=rf"last.A.{name}: <dA, A> = .* but <dB, B> = "):
            open_probe(made.path).check()
        path.write_bytes(whole)
    open_probe(made.path).check()


# One module in twenty passes by chance: eight of them do not.
EIGHT = {f"m.{i}.q": (40, 30, 4) for i in range(8)}


def test_gradients_at_other_factors_fail_the_euler_identity(tmp_path, rng):
    one, other = make_run(tmp_path / "r", rng, EIGHT).snapshots
    for name in ("adapter_model.safetensors", "gradients.safetensors"):
        kept = (other.path / name).read_bytes()
        shutil.copy(one.path / name, other.path / name)
        with pytest.raises(InputError, match=r"not the gradients at the factors beside them"):
            open_probe(other.path).check()
        (other.path / name).write_bytes(kept)
    open_probe(other.path).check()


def test_gradients_of_other_modules_fail_the_euler_identity(tmp_path, rng):
    made = make_run(tmp_path / "r", rng, EIGHT).snapshots[-1]
    snapshot = open_probe(made.path)
    turned = {}
    for name, other in zip(EIGHT, [*list(EIGHT)[1:], "m.0.q"], strict=True):
        turned[f"last.A.{name}"], turned[f"last.B.{name}"] = snapshot.gradients(other, "last")
    rewrite(made, **turned)
    with pytest.raises(InputError, match=r"last\.A\.m\.\d\.q: <dA, A> = "):
        open_probe(made.path).check()


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16_arithmetic_passes_the_euler_identity(tmp_path, rng, rank, tokens):
    """Every product of forward and backward rounded to bfloat16, as autocast does."""

    def rounded(x):
        return bf16_to_f32(f32_to_bf16(np.asarray(x, np.float32))).astype(np.float64)

    a, b = rng.standard_normal((rank, 64)) / 8, rng.standard_normal((48, rank)) * 1e-3
    x, y = rng.standard_normal((tokens, 64)), rng.standard_normal((tokens, 48)) * 1e-4
    made = make_snapshot(tmp_path / "s", {"m": (a, b)}, {"m": [y.T @ x]}, alpha=2 * rank)
    m = made.adapter.modules["m"]
    x, y, low_a, low_b = rounded(x), rounded(y), rounded(m.a), rounded(m.b)
    d_b = rounded(m.scale * y.T @ rounded(x @ low_a.T))
    d_a = rounded(rounded(m.scale * y @ low_b).T @ x)
    rewrite(made, **{"last.A.m": d_a.astype(np.float32), "last.B.m": d_b.astype(np.float32)})
    open_probe(made.path).check()
    assert bound("euler") == probe.EULER


def test_a_scale_forgotten_in_one_gradient_fails_the_euler_identity(tmp_path, rng):
    a, b = rng.standard_normal((4, 30)), rng.standard_normal((20, 4))
    made = make_snapshot(tmp_path / "s", {"m": (a, b)}, {"m": [b @ a]}, alpha=8)
    d_a = open_probe(made.path).gradients("m", "last")[0]
    rewrite(made, **{"last.A.m": d_a / np.float32(made.adapter.modules["m"].scale)})
    with pytest.raises(InputError, match=r"last\.A\.m: <dA, A> = "):
        open_probe(made.path).check()


def test_truncated_and_changed_files_are_refused(made):
    path = made.path / "gradients.safetensors"
    snapshot = open_probe(made.path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"gradients.safetensors: is truncated"):
        open_probe(made.path)
    with pytest.raises(InputError, match=r"gradients.safetensors: "):
        snapshot.gradients(Q)
    path.unlink()
    with pytest.raises(InputError, match=r"gradients.safetensors: cannot be read"):
        open_probe(made.path)


def test_incomplete_folders_are_refused(tmp_path, made, run):
    make_adapter(tmp_path / "plain")
    with pytest.raises(InputError, match=r"plain: has no probe.json: not a snapshot of a probe"):
        open_probe(tmp_path / "plain")
    with pytest.raises(InputError, match=r"plain: has no run.json: not a probe run"):
        open_run(tmp_path / "plain")
    for bad in (tmp_path / "nothing", made.path / "probe.json", "a\0b"):
        with pytest.raises(InputError):
            open_probe(bad)
    (made.path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors"):
        open_run(run.path)
    (made.path / "probe.json").unlink()
    with pytest.raises(InputError, match=r"step-0000010: has no probe.json"):
        open_run(run.path)


def test_a_scale_of_zero_is_refused(tmp_path):
    factors = {"m": (np.ones((1, 2)), np.ones((2, 1)))}
    made = make_snapshot(tmp_path / "s", factors, {"m": [np.ones((2, 2))]}, alpha=0)
    with pytest.raises(InputError, match=r"s: m: scale is 0"):
        open_probe(made.path)
