"""Points in files: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from adapters import make_zoo
from calibrations import MadePoints, make_points

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import points as points_io
from mergeprobe_fast.io import safetensors
from mergeprobe_fast.io.points import has_points, open_points
from mergeprobe_fast.io.points_writer import PointsWriter
from mergeprobe_fast.zoo import open_zoo

NAMES = ("adapter_000", "adapter_001", "adapter_002")
AT = "trained:adapter_001"


@pytest.fixture
def made(tmp_path: Path, rng: np.random.Generator) -> MadePoints:
    make_zoo(tmp_path / "zoo", 3)
    zoo = open_zoo(tmp_path / "zoo")
    return make_points(
        tmp_path / "cal", zoo.adapters, ["math", "math", "code"], rng,
        sequences={"math": 4, "code": 1},
    )  # fmt: skip


def test_what_was_written_is_read(made):
    points = open_points(made.path)
    assert points.adapters == NAMES and dict(points.fingerprints) == made.info.fingerprints
    assert points.modules == made.info.modules and len(points.modules) == 4
    assert list(points.points) == ["base:math", "base:code", *(f"trained:{n}" for n in NAMES)]
    point = points.points[AT]
    assert (point.kind, point.adapter, point.domain, point.sequences) == (
        "trained", "adapter_001", "math", 4
    )  # fmt: skip
    assert repr(points) == "<Points: 5, along 3 adapters>"
    for key, point in points.points.items():
        s = point.sequences
        for labels in ("data", "model"):
            phi = points.phi(key, labels)
            assert phi.dtype == np.float64 and phi.shape == (s, 3)
            np.testing.assert_array_equal(phi, made.tensors[f"phi_{labels}.{key}"])
        np.testing.assert_array_equal(points.first(key), made.tensors[f"first.{key}"])
        np.testing.assert_array_equal(points.curvature(key), made.tensors[f"curvature.{key}"])
        names = ("base_loss", "loss", "tokens")
        for values, name in zip(points.losses(key), names, strict=True):
            np.testing.assert_array_equal(values, made.tensors[f"{name}.{key}"])
        assert points.losses(key)[2].dtype == np.int64


def test_the_size_is_known_before(made):
    actual = sum(path.stat().st_size for path in made.path.iterdir())
    assert 0.5 * made.info.nbytes < actual < made.info.nbytes + 4096


def test_an_unknown_point_or_kind_is_named(made):
    points = open_points(made.path)
    with pytest.raises(InputError, match=r"points.json: trained:law: has no such point"):
        points.first("trained:law")
    with pytest.raises(InputError, match="labels 'both' are none of data, model"):
        points.phi(AT, "both")


BAD_FIELDS = [
    (("format",), "other", "format: is not 'mergeprobe-points'"),
    (("version",), 2, "version: is 2, this program reads 1"),
    (("surprise",), 1, "surprise: is not a field of this format"),
    (("adapters",), {}, "adapters: is empty"),
    (("adapters", "adapter_000"), "abc", "adapters.adapter_000: is not 64 hexadecimal digits"),
    (("modules",), [], "modules: is empty"),
    (("modules",), ["a", "a"], "modules: names one twice"),
    (("points",), {}, "points: is empty"),
    (("points", AT, "kind"), "merged", f"points.{AT}: does not describe that point"),
    (("points", AT, "kind"), "base", f"points.{AT}: does not describe that point"),
    (("points", AT, "adapter"), "adapter_000", f"points.{AT}: does not describe that point"),
    (("points", AT, "adapter"), None, f"points.{AT}: does not describe that point"),
    (("points", "base:math", "domain"), "code", "points.base:math: does not describe that point"),
    (("points", AT, "sequences"), 0, f"points.{AT}.sequences: is not an integer from 1"),
    (("points", AT, "loss"), 1, f"points.{AT}.loss: is not a field of this format"),
]


@pytest.mark.parametrize("path, value, reason", BAD_FIELDS)
def test_a_bad_field_is_named(made, path, value, reason):
    file = made.path / "points.json"
    fields = json.loads(file.read_text())
    at = fields
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        open_points(made.path)
    assert caught.value.path == str(file) and reason in str(caught.value)


def rewrite(made: MadePoints, key: str, values: np.ndarray | None) -> None:
    tensors = {k: v.astype("<i4") if v.dtype.kind == "i" else v for k, v in made.tensors.items()}
    tensors.pop(key, None)
    if values is not None:
        tensors[key] = values
    safetensors.write(made.path / "points.safetensors", tensors)


@pytest.mark.parametrize(
    "key, values, reason",
    [
        (f"first.{AT}", None, f"first.{AT}: is missing"),
        ("first.trained:law", np.zeros((4, 3)), "is not a tensor of these points"),
        (f"first.{AT}", np.zeros((3, 4)), "is F64 (3, 4), not F64 (4, 3)"),
        (f"first.{AT}", np.zeros((4, 3), np.float32), "is F32 (4, 3), not F64 (4, 3)"),
    ],
)
def test_tensors_are_exactly_those_declared(made, key, values, reason):
    rewrite(made, key, values)
    with pytest.raises(InputError) as caught:
        open_points(made.path)
    assert caught.value.path == str(made.path / "points.safetensors")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "key, values, reason",
    [
        (f"phi_data.{AT}", np.full((4, 3), np.nan), "has NaN or Inf"),
        (f"curvature.{AT}", np.full((4, 3), -1.0), "is negative"),
        (f"loss.{AT}", np.array([1.0, 2, -1e-9, 3]), "is negative"),
        (f"tokens.{AT}", np.array([1, 2, 0, 3], "<i4"), "has a text without labels"),
    ],
)
def test_what_is_none_is_refused_when_read(made, key, values, reason):
    rewrite(made, key, values)
    points = open_points(made.path)
    with pytest.raises(InputError) as caught:
        points.phi(AT, "data")
        points.curvature(AT)
        points.losses(AT)
    assert caught.value.key == key and caught.value.reason == reason


def test_a_file_that_changed_is_an_error(made):
    points = open_points(made.path)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    (made.path / "points.safetensors").touch()
    with pytest.raises(InputError) as caught:
        points.first(AT)
    assert caught.value.path == str(made.path / "points.safetensors")


def test_a_folder_without_points_is_refused(tmp_path):
    assert not has_points(tmp_path) and not has_points(tmp_path / "no")
    with pytest.raises(InputError, match=r"has no points.json: calibrate --adapters makes it"):
        open_points(tmp_path)


def test_what_the_reader_would_refuse_is_not_written(tmp_path, made):
    bad = points_io.PointsInfo({}, made.info.modules, made.info.points)
    with pytest.raises(InputError, match="adapters: is empty"):
        with PointsWriter(tmp_path, bad):
            pass
    with pytest.raises(InputError, match=r"first.base:code: is NaN or Inf"):
        with PointsWriter(tmp_path, made.info) as writer:
            writer.write("base:code", first=np.full((4, 3), np.inf))
    with pytest.raises(InputError, match="bytes were never written"):
        with PointsWriter(tmp_path, made.info) as writer:
            writer.write("base:code", first=np.zeros((4, 3)))
    assert points_io.parse(points_io.to_json(made.info)) == made.info
    assert sorted(os.listdir(made.path)) == ["points.json", "points.safetensors"]
