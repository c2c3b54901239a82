"""Calibrations of version 2: output moments, outputs, two kinds of labels; version 1 is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from calibrations import make_calibration

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import safetensors
from mergeprobe_fast.io.calibration import open_calibration

Q, K, DOWN = "layers.0.q", "layers.0.k", "layers.10.down"
MODULES = {Q: (6, 5), K: (3, 5), DOWN: (5, 1)}
DOMAINS = {"math": 7, "code": 1}


def make(tmp_path: Path, rng: np.random.Generator, **arguments: object):
    given = {"shared": {K: Q}, "gradients": True} | arguments
    return make_calibration(tmp_path / "cal", MODULES, DOMAINS, rng, **given)


def test_both_labels_are_told_apart(tmp_path, rng):
    made = make(tmp_path, rng, labels="both", outputs=True)
    calibration = open_calibration(made.path)
    assert calibration.labels == ("model", "data") and calibration.info.labels == "both"
    assert calibration.has_outputs and calibration.has_output_moments and calibration.has_gradients
    for at in made.gradients:
        for labels in (None, "model"):
            np.testing.assert_array_equal(calibration.gradients(*at, labels), made.gradients[at])
            np.testing.assert_array_equal(
                calibration.gradient_moment(*at, labels), made.gradient_moments[at]
            )
        np.testing.assert_array_equal(calibration.gradients(*at, "data"), made.data_gradients[at])
        np.testing.assert_array_equal(
            calibration.gradient_moment(*at, "data"), made.data_gradient_moments[at]
        )
        assert (made.gradients[at] != made.data_gradients[at]).any()
        np.testing.assert_array_equal(calibration.outputs(*at), made.outputs[at])
        np.testing.assert_array_equal(calibration.output_moment(*at), made.output_moments[at])
    with pytest.raises(InputError, match=r"layers.9.q: has no such module"):
        calibration.outputs("math", "layers.9.q")
    with pytest.raises(InputError, match=r"law: has no such domain, only math, code"):
        calibration.output_moment("law", Q)


@pytest.mark.parametrize("labels, other", [("model", "data"), ("data", "model")])
def test_labels_that_were_not_recorded_are_refused(tmp_path, rng, labels, other):
    made = make(tmp_path, rng, labels=labels)
    calibration = open_calibration(made.path)
    assert calibration.labels == (labels,)
    for given in (None, labels):
        rows = calibration.gradients("math", K, given)
        np.testing.assert_array_equal(rows, made.gradients["math", K])
    with pytest.raises(InputError, match=f"has no gradients of labels '{other}', only {labels}"):
        calibration.gradients("math", K, other)
    with pytest.raises(InputError, match=f"has no gradients of labels '{other}', only {labels}"):
        calibration.gradient_moment("math", K, other)


def test_what_was_not_recorded_is_refused(tmp_path, rng):
    calibration = open_calibration(make(tmp_path, rng, gradients=False).path)
    assert calibration.labels == () and not calibration.has_gradients
    assert calibration.has_output_moments and not calibration.has_outputs
    for read, reason in (
        (calibration.outputs, "was recorded without outputs: calibrate --outputs"),
        (calibration.gradients, "was recorded without gradients"),
    ):
        with pytest.raises(InputError, match=reason):
            read("math", Q)


def test_the_loss_of_a_domain_is_told(tmp_path, rng):
    made = make(tmp_path, rng, losses={"code": "completion"}, sequences=3)
    calibration = open_calibration(made.path)
    assert [d.loss for d in calibration.domains.values()] == ["all", "completion"]
    assert calibration.domains["math"].sequences == 3
    assert calibration.sampled_tokens("math")[0].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_file_of_version_1_is_read(tmp_path, rng):
    made = make(tmp_path, rng, version=1)
    fields = json.loads((made.path / "calibration.json").read_text())
    assert fields["version"] == 1 and "outputs" not in fields
    assert set(fields["domains"]["math"]) == {
        "source", "sha256", "sequences", "tokens", "samples", "files"
    }  # fmt: skip
    keys = safetensors.read_header(made.path / "math.safetensors").tensors
    assert {key.split(".")[0] for key in keys} == {
        "sequence", "position", "input", "moment", "gradient", "gradient_moment"
    }  # fmt: skip
    calibration = open_calibration(made.path)
    assert not calibration.has_output_moments and not calibration.has_outputs
    assert calibration.labels == ("model",) and calibration.domains["math"].loss == "all"
    np.testing.assert_array_equal(calibration.inputs("math", K), made.inputs["math", Q])
    np.testing.assert_array_equal(calibration.gradients("math", K), made.gradients["math", K])
    with pytest.raises(InputError, match="was recorded without output moments: calibrate anew"):
        calibration.output_moment("math", Q)


@pytest.mark.parametrize(
    "version, path, value, reason",
    [
        (1, ("outputs",), False, "outputs: is not a field of this format"),
        (1, ("labels",), "both", "labels: is none of null, model, data"),
        (1, ("domains", "math", "loss"), "all", "domains.math.loss: is not a field"),
        (2, ("labels",), "both", "gradient_data.layers.0.k: is missing"),
        (2, ("outputs",), True, "output.layers.0.k: is missing"),
        (1, ("version",), 2, "outputs: is missing"),
        (2, ("version",), 1, "outputs: is not a field of this format"),
    ],
)
def test_versions_are_not_mixed(tmp_path, rng, version, path, value, reason):
    made = make(tmp_path, rng, version=version)
    file = made.path / "calibration.json"
    fields = json.loads(file.read_text())
    at = fields
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        open_calibration(made.path)
    assert reason in str(caught.value)
