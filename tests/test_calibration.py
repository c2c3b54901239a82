"""Calibration folders: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from calibrations import MadeCalibration, make_calibration

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import calibration_json, calibration_writer, safetensors
from mergeprobe_fast.io.calibration import Calibration, open_calibration
from mergeprobe_fast.io.calibration_writer import CalibrationWriter, written_nbytes
from mergeprobe_fast.io.safetensors_stream import StreamWriter

Q, K, DOWN = "layers.0.q", "layers.0.k", "layers.10.down"
MODULES = {Q: (6, 5), K: (3, 5), DOWN: (5, 1)}
SHARED = {K: Q}


@pytest.fixture
def made(tmp_path: Path, rng: np.random.Generator) -> MadeCalibration:
    domains = {"math": 7, "code": 1}
    return make_calibration(tmp_path / "cal", MODULES, domains, rng, shared=SHARED, gradients=True)


def assert_holds(calibration: Calibration, made: MadeCalibration) -> None:
    for (domain, module), rows in made.inputs.items():
        found = calibration.inputs(domain, module)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_array_equal(
            calibration.moment(domain, module), made.moments[domain, module]
        )
    for (domain, module), rows in made.gradients.items():
        np.testing.assert_array_equal(calibration.gradients(domain, module), rows)
        expected = made.gradient_moments[domain, module]
        np.testing.assert_array_equal(calibration.gradient_moment(domain, module), expected)


def test_what_was_written_is_read(made):
    calibration = open_calibration(made.path)
    assert calibration.info.domains["math"].files == ("math.safetensors",)
    assert sorted(os.listdir(made.path)) == [
        "calibration.json", "code.safetensors", "math.safetensors"
    ]  # fmt: skip
    assert (calibration.base_model, calibration.point) == ("test/base", "base")
    assert list(calibration.domains) == ["math", "code"]
    assert list(calibration.modules) == list(MODULES)
    assert calibration.has_gradients and calibration.notes == ()
    assert calibration.modules[K].d_in == 5 and calibration.modules[K].d_out == 3
    assert repr(calibration) == "<Calibration of test/base: 3 modules, math 7, code 1>"
    assert_holds(calibration, made)
    sequence, position = calibration.sampled_tokens("math")
    assert sequence.dtype == position.dtype == np.int32
    assert sequence.tolist() == [0] * 7 and position.tolist() == list(range(1, 8))


def test_modules_with_one_input_share_its_samples(made):
    calibration = open_calibration(made.path)
    assert [calibration.input_key(name) for name in MODULES] == [Q, Q, DOWN]
    np.testing.assert_array_equal(calibration.inputs("math", K), calibration.inputs("math", Q))
    header = safetensors.read_header(made.path / "math.safetensors")
    inputs = [key for key in header.tensors if key.startswith("input.")]
    assert sorted(inputs) == [f"input.{Q}", f"input.{DOWN}"]


@pytest.mark.parametrize("limit", [1, 64, 300])
def test_a_large_domain_is_cut_into_several_files(tmp_path, rng, limit):
    made = make_calibration(tmp_path / "cal", MODULES, {"math": 9}, rng, shard_nbytes=limit)
    calibration = open_calibration(made.path)
    files = calibration.domains["math"].files
    assert len(files) > 1 and files[0] == f"math-00001-of-{len(files):05d}.safetensors"
    assert sorted(os.listdir(made.path)) == ["calibration.json", *files]
    assert_holds(calibration, made)
    assert not calibration.has_gradients
    with pytest.raises(InputError, match="without gradients"):
        calibration.gradients("math", Q)


def test_the_size_is_known_before(made):
    actual = sum(path.stat().st_size for path in made.path.iterdir())
    tensors = sum(
        ref.nbytes
        for name in ("math", "code")
        for ref in safetensors.read_header(made.path / f"{name}.safetensors").tensors.values()
    )
    assert tensors < written_nbytes(made.info) and actual < written_nbytes(made.info) + 4096


def test_unknown_domain_and_module_are_named(made):
    calibration = open_calibration(made.path)
    with pytest.raises(InputError, match=r"cal: law: has no such domain, only math, code"):
        calibration.inputs("law", Q)
    with pytest.raises(InputError, match=r"cal: layers.9.q: has no such module"):
        calibration.inputs("math", "layers.9.q")


def edit(made: MadeCalibration, *path: str, value: object = ...) -> None:
    """Set, or with no value delete, one field of calibration.json."""
    file = made.path / "calibration.json"
    fields = json.loads(file.read_text())
    at = fields
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    file.write_text(json.dumps(fields))


BAD_FIELDS = [
    (("format",), "other", "format: is not 'mergeprobe-calibration'"),
    (("version",), 3, "version: is 3, this program reads 1 to 2"),
    (("outputs",), 1, "outputs: is neither true nor false"),
    (("domains", "math", "loss"), "some", "domains.math.loss: is none of all, completion"),
    (("version",), True, "version: is True"),
    (("surprise",), 1, "surprise: is not a field of this format"),
    (("seed",), ..., "seed: is missing"),
    (("point",), "merged", "point: is none of base"),
    (("labels",), "guessed", "labels: is none of"),
    (("samples",), 0, "samples: is not an integer from 1"),
    (("notes",), "text", "notes: is not a list"),
    (("base_model", "name"), "", "base_model.name: is not a text"),
    (("base_model", "path"), 3, "base_model.path: is not a text"),
    (("base_model", "config_sha256"), "abc", "config_sha256: is not 64 hexadecimal digits"),
    (("domains",), {}, "domains: is empty"),
    (("domains",), [], "domains: is not an object"),
    (("domains", "../x"), {}, r"domains.../x: is no name for a domain"),
    (("domains", "math", "files"), ["../math.safetensors"], "is not the name of a safetensors"),
    (("domains", "math", "files"), ["code.safetensors"], "domains: two domains"),
    (("domains", "math", "files"), [], "domains.math.files: is empty"),
    (("domains", "math", "samples"), 6, "domains.math.samples: is not the smaller"),
    (("domains", "math", "tokens"), 2.5, "domains.math.tokens: is not an integer"),
    (("modules", Q, "d_in"), -5, f"modules.{Q}.d_in: is not an integer"),
    (("modules", K, "input"), "nowhere", f"modules.{K}.input: is not a module with that input"),
    (("modules", K, "input"), DOWN, f"modules.{K}.input: is not a module with that input"),
    (("modules", K, "d_in"), 4, f"modules.{K}.input: is not a module with that input"),
    (("modules", K), 4, f"modules.{K}: is not an object"),
]


@pytest.mark.parametrize("path, value, reason", BAD_FIELDS)
def test_a_bad_field_is_named(made, path, value, reason):
    edit(made, *path, value=value)
    with pytest.raises(InputError) as caught:
        open_calibration(made.path)
    assert caught.value.path == str(made.path / "calibration.json")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "path, value, reason",
    [
        (("modules", DOWN, "d_out"), 6, f"gradient_moment.{DOWN}: is F64 (5,), not F64 (6,)"),
        (("modules", DOWN), ..., f"{DOWN}: is not a tensor of this calibration"),
        (("modules", DOWN, "input"), DOWN, None),
        (("labels",), None, "is not a tensor of this calibration"),
        (("modules", K, "input"), K, f"input.{K}: is missing"),
    ],
)
def test_tensors_are_exactly_those_declared(made, path, value, reason):
    edit(made, *path, value=value)
    if reason is None:
        assert_holds(open_calibration(made.path), made)
        return
    with pytest.raises(InputError) as caught:
        open_calibration(made.path)
    assert caught.value.path == str(made.path / "math.safetensors") and reason in str(caught.value)


def rewrite(made: MadeCalibration, key: str, dtype: str, values: np.ndarray) -> None:
    """The file of the domain math with one tensor replaced."""
    path = made.path / "math.safetensors"
    raw = path.read_bytes()
    tensors = {}
    for name, ref in safetensors.read_header(path).tensors.items():
        tensors[name] = ref.dtype, ref.shape, raw[ref.offset : ref.offset + ref.nbytes]
    tensors[key] = dtype, values.shape, values
    safetensors.write(path, tensors)


def test_what_is_not_a_sample_is_refused_when_read(made):
    bits = np.full((7, 5), 0x7FC0, "<u2")
    for key, dtype, values, reason in [
        (f"input.{Q}", "BF16", bits, "has NaN or Inf"),
        (f"moment.{Q}", "F64", np.full(5, np.inf), "has NaN or Inf"),
        (f"moment.{Q}", "F64", np.full(5, -1.0), "a mean of squares is negative"),
        ("sequence", "I32", np.full(7, 1, "<i4"), "has a number that is none of a sequence"),
        ("position", "I32", np.arange(7, dtype="<i4"), "has a position that is not sampled"),
        ("position", "I32", np.arange(2, 9, dtype="<i4"), "has a position that is not sampled"),
        ("position", "I32", np.array([1, 2, 3, 3, 4, 5, 6], "<i4"), "or one is there twice"),
    ]:
        before = (made.path / "math.safetensors").read_bytes()
        rewrite(made, key, dtype, values)
        calibration = open_calibration(made.path)
        with pytest.raises(InputError) as caught:
            calibration.sampled_tokens("math")
            calibration.moment("math", K)
            calibration.inputs("math", K)
        assert caught.value.key == key and reason in caught.value.reason
        assert caught.value.path == str(made.path / "math.safetensors")
        (made.path / "math.safetensors").write_bytes(before)


def test_another_dtype_is_refused(made):
    rewrite(made, f"input.{Q}", "F16", np.zeros((7, 5), "<f2"))
    with pytest.raises(InputError, match=r"is F16 \(7, 5\), not BF16 \(7, 5\)"):
        open_calibration(made.path)


@pytest.mark.parametrize("spoil", ["truncate", "remove", "touch"])
def test_a_file_that_changed_is_an_error(made, spoil):
    calibration = open_calibration(made.path)
    path = made.path / "math.safetensors"
    time.sleep(0.02)  # longer than a tick of the file system's clock
    if spoil == "truncate":
        os.truncate(path, 900)
    elif spoil == "remove":
        path.unlink()
    else:
        path.touch()
    with pytest.raises(InputError) as caught:
        calibration.inputs("math", Q)
    assert caught.value.path == str(path)


def test_what_is_no_calibration_is_refused(tmp_path, made):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: has no calibration.json"):
        open_calibration(tmp_path / "empty")
    with pytest.raises(InputError, match=r"nowhere: is not a calibration folder"):
        open_calibration(tmp_path / "nowhere")
    (made.path / "calibration.json").write_text("{]")
    with pytest.raises(InputError, match="not valid JSON"):
        open_calibration(made.path)


def test_only_a_calibration_is_replaced(tmp_path, rng, made):
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        make_calibration(made.path, MODULES, {"math": 2}, rng)
    # Other domains than before, and other files.
    again = make_calibration(made.path, MODULES, {"law": 2}, rng, overwrite=True)
    assert sorted(os.listdir(made.path)) == ["calibration.json", "law.safetensors"]
    assert_holds(open_calibration(made.path), again)
    (made.path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds 'thesis.txt', which this command does not write"):
        make_calibration(made.path, MODULES, {"law": 2}, rng, overwrite=True)
    shutil.rmtree(made.path)
    made.path.mkdir()
    (made.path / "calibration.json").write_text("mine")
    with pytest.raises(InputError, match="not overwritten"):
        make_calibration(made.path, MODULES, {"law": 2}, rng, overwrite=True)


def test_an_incomplete_recording_leaves_nothing(tmp_path, made):
    shutil.rmtree(made.path)
    with pytest.raises(InputError) as caught:
        with CalibrationWriter(made.path, made.info) as writer:
            writer.inputs("math", Q, made.inputs["math", Q][:3], first=4)
    assert caught.value.reason.endswith("bytes were never written")
    assert caught.value.path.startswith(str(made.path))
    with pytest.raises(KeyboardInterrupt):
        with CalibrationWriter(made.path, made.info):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_numbers_that_do_not_fit_are_not_written(tmp_path, made, value):
    rows = np.ones((7, 5), np.float32)
    rows[3, 2] = value  # 3.4e38 is finite in float32 and rounds to infinity in BF16
    with pytest.raises(InputError) as caught:
        with CalibrationWriter(tmp_path / "new", made.info) as writer:
            writer.inputs("math", Q, rows)
    assert caught.value.key == Q and "domain 'math' are NaN or too large" in caught.value.reason
    with pytest.raises(InputError, match="gradients in domain 'math'"):
        with CalibrationWriter(tmp_path / "new", made.info) as writer:
            writer.gradient_moment("math", Q, np.full(6, np.nan))
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_noticed_before(tmp_path, made, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(calibration_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"GB, and the disk has 0.00 GB left"):
        CalibrationWriter(tmp_path / "deep" / "new", made.info).check()
    assert not (tmp_path / "deep").exists()


def test_names_of_domains_are_names_of_files():
    for name in ("math", "GSM8K", "c++-17", "a", "数学", "en.v2", "x" * 100):
        assert calibration_json.is_domain_name(name), name
    for name in ("", ".", "..", "a/b", "a\\b", "-x", ".x", "a\n", "a b", "x" * 101, "a\0", "C:"):
        assert not calibration_json.is_domain_name(name), name


def test_streamed_bytes_are_those_of_the_writer(tmp_path, rng):
    tensors = {
        "a.10": rng.standard_normal((5, 3)), "a.2": rng.integers(0, 9, 4).astype("<i4"),
        "b": rng.standard_normal((1, 2, 2)).astype("<f4"), "empty": np.zeros((0, 4), "<f4"),
    }  # fmt: skip
    safetensors.write(tmp_path / "whole", tensors, {"z": "1", "a": "2"})
    names = {"f8": "F64", "i4": "I32", "f4": "F32"}
    declared = {k: (names[t.dtype.str[1:]], t.shape) for k, t in tensors.items()}
    with StreamWriter(tmp_path / "pieces", declared, {"a": "2", "z": "1"}) as writer:
        for key, tensor in tensors.items():
            for row in rng.permutation(len(tensor)):
                writer.write(key, tensor[row : row + 1], row)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_piece_outside_its_tensor_is_refused(tmp_path):
    writer = StreamWriter(tmp_path / "x", {"t": ("F32", (3, 2))})
    for rows, first in [
        (np.zeros((2, 2), "<f4"), 2), (np.zeros((1, 2), "<f4"), -1), (np.zeros((1, 3), "<f4"), 0),
        (np.zeros((1, 2), "<f8"), 0), (np.zeros((4, 2), "<f4"), 0), (np.zeros(2, "<f4"), 0),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=r"x: t: .* is no part of F32 \[3, 2\]"):
            writer.write("t", rows, first)
    writer.write("t", np.zeros((2, 2), "<f4"))
    with pytest.raises(InputError, match="is no part"):
        writer.write("t", np.zeros((2, 2), "<f4"), 1)
    with pytest.raises(InputError, match="t: 8 bytes were never written"):
        writer.__exit__(None, None, None)
    with pytest.raises(InputError, match="cannot be streamed"):
        StreamWriter(tmp_path / "y", {"t": ("F4", (2,))})


def test_a_folder_that_is_none_is_refused_in_one_sentence(tmp_path):
    for folder, reason in (
        (tmp_path, "has no calibration.json: not a calibration"),
        (tmp_path / "no", "is not a calibration folder"),
    ):
        with pytest.raises(InputError) as caught:
            open_calibration(folder)
        assert str(caught.value) == f"{folder}: {reason}"
