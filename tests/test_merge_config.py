"""``merge --config``, ``--set``, ``--energy``, and ``methods``: what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from adapters import make_adapter
from command_line import Run, assert_refused, runner, strict_json
from dense_merge import deltas, digests, merge_json

import mergeprobe_fast as mpf
from mergeprobe_fast.merging import MergeMethod, methods, registry
from mergeprobe_fast.merging.arguments import choice, flag, number, optional, whole
from mergeprobe_fast.merging.linear import linear


@pytest.fixture
def cli(capsys) -> Run:
    return runner(capsys)


@pytest.fixture
def zoo(tmp_path) -> Path:
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / "zoo" / name, seed=i)
    return tmp_path / "zoo"


@pytest.fixture
def scaled(monkeypatch) -> list[methods.MergeRequest]:
    """A method with arguments, and the requests that it gets."""
    seen: list[methods.MergeRequest] = []

    def run(request):
        """A test method."""
        seen.append(request)
        yield from linear(request)

    method = MergeMethod(
        "scaled", run,
        arguments={
            "density": methods.Argument(1.0, number(0, 1), "share kept", per_adapter=True),
            "dialect": methods.Argument("peft", choice("peft", "mergekit"), "whose rules"),
            "steps": methods.Argument(None, optional(whole(1)), "how many"),
            "strict": methods.Argument(False, flag, "or not"),
        },
        weights="one",
    )  # fmt: skip
    monkeypatch.setitem(registry.MERGE_METHODS, "scaled", method)
    return seen


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def test_a_configuration_says_what_the_command_line_says(cli, zoo, tmp_path):
    config = write(
        tmp_path / "merge.yaml", merge_method="svd", rank=3, dtype="float32",
        models=[{"model": "zoo/a", "parameters": {"weight": 0.75}},
                {"model": str(zoo / "b"), "parameters": {"weight": -0.5}}],
    )  # fmt: skip
    assert cli("merge", "--config", config, "--out", tmp_path / "x").code == 0
    ran = cli("merge", zoo / "a", zoo / "b", "--rank", 3, "--weights", "0.75,-0.5", "--out",
              tmp_path / "y", "--json")  # fmt: skip
    assert ran.code == 0
    assert digests(tmp_path / "x") == digests(tmp_path / "y")
    # What the command line says comes first.
    ran = cli("merge", "--config", config, "--rank", 2, "--method", "linear", "--dtype", "bf16",
              "--out", tmp_path / "z", "--json")  # fmt: skip
    report = strict_json(ran.out)
    assert (report["method"], report["rank"], report["dtype"]) == ("linear", 2, "BF16")


def test_weights_and_arguments_may_depend_on_adapter_and_module(cli, zoo, tmp_path, scaled):
    config = write(
        tmp_path / "merge.yaml", merge_method="scaled",
        models=[
            "zoo/a",
            {"model": "zoo/b", "parameters": {
                "weight": [{"filter": "v_proj", "value": 3}, {"value": [1, 2]}], "density": 0.25}},
        ],
        parameters={"weight": 0.5, "density": 0.75, "dialect": "mergekit"},
    )  # fmt: skip
    assert cli("merge", "--config", config, "--set", "steps=4", "--out", tmp_path / "x").code == 0
    request = scaled[0]
    names = [m.name for m in request.source.modules]
    wanted = [3 if "v_proj" in n else 1 if "layers.0" in n else 2 for n in names]
    np.testing.assert_array_equal(request.weights, np.stack([[0.5] * 4, wanted], axis=1))
    np.testing.assert_array_equal(request.arguments["density"], [[0.75, 0.25]] * 4)
    assert (request.arguments["dialect"], request.arguments["steps"]) == ("mergekit", 4)
    report = merge_json(tmp_path / "x")
    assert report["arguments"]["density"] == [0.75, 0.25]
    assert report["adapters"][0]["weight"] == 0.5 and report["adapters"][1]["weight"] == wanted


def test_equal_weights_are_the_methods(zoo, scaled):
    mpf.merge(zoo, "scaled")
    mpf.merge(zoo, "scaled", [2, 3], density={"b": 0.5, "a": 0.25}, strict=True)
    assert (scaled[0].weights == 1).all()
    assert (scaled[1].weights == [2, 3]).all()
    assert (scaled[1].arguments["density"] == [0.25, 0.5]).all()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "density=1.5"], ["density: must be in [0, 1], got 1.5"]),
        (["--set", "density=[0.5, 0.5, 0.5]"], ["density: expected one for each of 2 adapters"]),
        (["--set", "dialect=mine"], ["dialect: must be one of peft, mergekit"]),
        (["--set", "steps=1.5"], ["steps: must be an integer"]),
        (["--set", "steps=0"], ["steps: must be at least 1"]),
        (["--set", "strict=maybe"], ["strict: must be true or false"]),
        (["--set", "sparsity=0.5"], ["scaled takes no argument 'sparsity'", "density, dialect"]),
        (["--set", "density"], ["--set: expected NAME=VALUE"]),
        (["--set", "rank=3"], ["rank: is no parameter of a method but an option of merge: --rank"]),
        (["--energy", "1.5"], ["energy: must be in (0, 1]"]),
        (["--dtype", "int8"], ["dtype: must be float32, bfloat16 or float16"]),
    ],
)
def test_arguments_are_checked(cli, zoo, tmp_path, scaled, words, parts):
    ran = cli("merge", zoo, "--method", "scaled", *words, "--out", tmp_path / "out")
    assert_refused(ran, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: [", ["merge.yaml: is no YAML", "line 1"]),
        ("- a", ["merge.yaml: is no mapping"]),
        ("merge_method: svd", ["models: expected a list of models"]),
        ("merge_method: tis", ["merge_method: no method 'tis'"]),
        ("models: [zoo/a]\nbase_model: x", ["base_model: unknown key"]),
        ("models: [3]", ["models[0]: expected a path"]),
        ("models: [{model: zoo/a, weight: 1}]", ["models[0].weight: unknown key"]),
        ("models: [{model: zoo/a, parameters: {density: 1}}]",
         ["models[0].parameters.density: svd has no such parameter"]),
        ("models: [{model: zoo/a, parameters: {weight: 1}}, zoo/b]",
         ["models[1].parameters: has no weight"]),
        ("models: [{model: zoo/a, domain: x}, zoo/b]", ["models[1]: has no domain"]),
        ("models: [zoo/a]\ndtype: int4", ["dtype: must be float32"]),
        ("models: [zoo/a]\nrank: many", ["rank: must be a positive integer"]),
        ("models: [zoo/nowhere]", ["nowhere"]),
        ("models: [zoo/a]\nparameters: 3", ["parameters: expected names and values"]),
    ],
)  # fmt: skip
def test_a_configuration_is_checked(cli, zoo, tmp_path, content, parts):
    (tmp_path / "merge.yaml").write_text(content, "utf-8")
    ran = cli("merge", "--config", tmp_path / "merge.yaml", "--out", tmp_path / "out")
    assert_refused(ran, *parts)
    assert not (tmp_path / "out").exists()


def test_a_configuration_names_the_adapters(cli, zoo, tmp_path):
    config = write(tmp_path / "merge.yaml", models=["zoo/a"])
    assert_refused(cli("merge", zoo, "--config", config, "--out", tmp_path / "x"), "give either")
    assert_refused(cli("merge", "--config", tmp_path / "no.yaml", "--out", tmp_path / "x"),
                   "no.yaml: No such file")  # fmt: skip
    assert_refused(cli("merge", "--out", tmp_path / "x"), "ADAPTER: none given")


def test_yaml_runs_no_code(cli, zoo, tmp_path):
    marker = tmp_path / "ran"
    text = f"models: !!python/object/apply:os.system ['touch {marker}']"
    (tmp_path / "merge.yaml").write_text(text, "utf-8")
    ran = cli("merge", "--config", tmp_path / "merge.yaml", "--out", tmp_path / "out")
    assert_refused(ran, "is no YAML")
    assert not marker.exists()


def test_energy_on_the_command_line(cli, zoo, tmp_path):
    assert cli("merge", zoo, "--energy", 0.5, "--out", tmp_path / "x").code == 0
    report = merge_json(tmp_path / "x")
    assert report["energy"] == 0.5 and report["rank"] is None
    assert all(1 - m["truncation_error_relative"] ** 2 >= 0.5 for m in report["modules"].values())
    assert {m["rank"] for m in report["modules"].values()} < set(range(1, 8))
    assert set(deltas(tmp_path / "x")) == set(report["modules"])


def test_methods_are_listed_and_explained(cli):
    listed = cli("methods")
    assert listed.code == 0
    for name, method in mpf.MERGE_METHODS.items():
        assert name in listed.out
        assert method.summary.endswith(".") and len(method.summary) > 20, name
        one = cli("methods", name)
        assert one.code == 0 and name in one.out
        for argument, declared in method.arguments.items():
            assert f"--set {argument}=" in one.out and declared.help
        described = json.loads(cli("methods", name, "--json").out)[0]
        assert described["equal_weights"] in ("1/N each", "1 each")
    assert_refused(cli("methods", "tis"), "no method 'tis'")


@pytest.mark.parametrize("name", mpf.MERGE_METHODS)
def test_every_method_documents_itself(name):
    """What it does, exact or bounded, gauge-invariant or not, and where it comes from."""
    text = " ".join((mpf.MERGE_METHODS[name].run.__doc__ or "").lower().split())
    assert "exact" in text or "error" in text, "how exact it is"
    assert "gauge-invariant" in text, "whether it is gauge-invariant"
    assert any(word in text for word in ("et al", "peft", "mergekit", "(20", " 19", " 20", "&"))
    defaults = mpf.MERGE_METHODS[name].defaults
    for key, argument in mpf.MERGE_METHODS[name].arguments.items():
        if not argument.per_adapter:
            argument.check(defaults[key])
