"""Points: what does not fit is named before the work, and nothing is left of what failed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import make_adapter
from tiny_bases import draw_sequences, make_base, write_ids

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration import open_calibration
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.io.points import has_points, open_points
from mergeprobe_fast.record import calibrate, plan_calibration

Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SIZES = {Q0: (16, 16, 2), UP1: (24, 16, 3)}


@pytest.fixture
def base(tmp_path: Path) -> torch.nn.Module:
    return make_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    return {"math": write_ids(tmp_path / "d.jsonl", draw_sequences(rng, (9, 3, 6)))}


def adapter(tmp_path: Path, name: str = "math-a", **arguments: object) -> Path:
    sizes = arguments.pop("modules", SIZES)
    return make_adapter(tmp_path / "zoo" / name, sizes, magnitude=0.1, **arguments).path


def refused(base: object, data: object, tmp_path: Path, **arguments: object) -> InputError:
    with pytest.raises(InputError) as caught:
        plan_calibration(base, data, adapters=tmp_path / "zoo", **arguments)
    return caught.value


@pytest.mark.parametrize(
    "name, size, reason",
    [
        ("model.layers.7.mlp.up_proj", (24, 16, 2), "math-b: the base model has no such module"),
        (UP1, (24, 8, 2), "math-b: is 24 x 8, in the base model 24 x 16"),
        ("model.layers.1.mlp", (24, 16, 2), "math-b: only linear modules can be measured, not "
         "LlamaMLP"),
    ],
)  # fmt: skip
def test_a_module_that_does_not_fit_is_named(tmp_path, base, data, name, size, reason):
    adapter(tmp_path, "math-a", modules={Q0: SIZES[Q0]})
    path = adapter(tmp_path, "math-b", modules={name: size})
    error = refused(base, data, tmp_path)
    assert (error.path, error.key, error.reason) == (str(path), name, reason)


def test_an_embedding_is_refused(tmp_path, base, data):
    name = "model.embed_tokens"
    path = adapter(tmp_path, modules={name: (16, 48, 2)}, embeddings=(name,))
    error = refused(base, data, tmp_path)
    assert (error.path, error.key) == (str(path), name) and "only linear modules" in error.reason


def test_an_adapter_without_a_domain_is_named(tmp_path, base, data):
    adapter(tmp_path, "law")
    assert "calibration domain of 'law'" in refused(base, data, tmp_path).reason
    assert "--domain law=DOMAIN" in refused(base, data, tmp_path).reason
    error = refused(base, data, tmp_path, domains={"law": "code"})
    assert "no domain 'code'" in error.reason
    plan = plan_calibration(base, data, adapters=tmp_path / "zoo", domains={"law": "math"})
    assert list(plan.points.info.points) == ["base:math", "trained:law"]
    with pytest.raises(InputError, match="domains: given without adapters"):
        plan_calibration(base, data, domains={"law": "math"})


def test_a_text_without_a_label_is_named(tmp_path, base):
    data = {"math": write_ids(tmp_path / "d.jsonl", [[3, 4], [5]])}
    adapter(tmp_path)
    error = refused(base, data, tmp_path, skip_first=0)
    assert (error.key, error.path) == ("line 2", str(data["math"]))
    assert error.reason == "has no token that is a label among its first 512"
    assert plan_calibration(base, data, skip_first=0).points is None


def test_a_domain_is_not_called_like_the_file_of_the_points(tmp_path, base, data):
    adapter(tmp_path)
    plan = plan_calibration(base, {"Points": data["math"]}, adapters=tmp_path / "zoo",
                            domains=["Points"])  # fmt: skip
    with pytest.raises(InputError, match="is the name of the file of the points"):
        plan.check_out(tmp_path / "cal")
    calibrate(base, {"points": data["math"]}, tmp_path / "cal")


def test_the_size_and_the_work_are_known_before(tmp_path, base, data):
    adapter(tmp_path)
    adapter(tmp_path, "math-b")
    plan = plan_calibration(tmp_path / "base", data, adapters=tmp_path / "zoo")
    alone = plan_calibration(tmp_path / "base", data)
    assert "3 points along 2 adapters, 9 passes" in plan.summary()
    assert plan.steps == 3 + 9 and not plan.streamed and alone.streamed
    assert any("points of adapters need all of it" in note for note in plan.info.notes)
    steps: list[int] = []
    plan.record(tmp_path / "cal", progress=steps.append)
    assert sum(steps) == plan.steps
    written = sum(path.stat().st_size for path in (tmp_path / "cal").iterdir())
    assert alone.nbytes < plan.nbytes and 0.5 * plan.nbytes < written <= plan.nbytes + 8192
    with pytest.raises(InputError, match="would overwrite the input"):
        plan.check_out(tmp_path / "zoo" / "math-b", overwrite=True)


@pytest.mark.parametrize("at", [1, 4, 8])
def test_an_interrupted_pass_leaves_nothing(tmp_path, base, data, at):
    adapter(tmp_path)
    left = [at]

    def interrupt(steps: int) -> None:
        left[0] -= steps
        if not left[0]:
            raise KeyboardInterrupt

    base.train()
    with pytest.raises(KeyboardInterrupt):
        calibrate(base, data, tmp_path / "cal", adapters=tmp_path / "zoo", progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["base", "d.jsonl", "zoo"]
    assert all(module.training for module in base.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert all(p.grad is None and p.requires_grad for p in base.parameters())


def test_a_calibration_with_points_is_replaced_as_a_whole(tmp_path, base, data):
    adapter(tmp_path)
    out = tmp_path / "cal"
    calibrate(base, data, out, adapters=tmp_path / "zoo")
    assert has_points(out) and open_points(out).adapters == ("math-a",)
    calibrate(base, data, out, overwrite=True)
    assert sorted(os.listdir(out)) == ["calibration.json", "math.safetensors"]
    assert not has_points(out) and open_calibration(out).labels == ()
    with pytest.raises(InputError, match=r"cal: has no points.json: calibrate --adapters makes it"):
        open_points(out)
    calibrate(base, data, out, adapters=tmp_path / "zoo", overwrite=True)
    assert has_points(out)


def test_factors_that_are_not_numbers_are_named(tmp_path, base, data):
    bad = np.zeros((24, 3))
    bad[5, 1] = np.nan
    path = adapter(tmp_path, factors={UP1: (np.ones((3, 16)), bad)})
    with pytest.raises(InputError) as caught:
        calibrate(base, data, tmp_path / "cal", adapters=tmp_path / "zoo")
    assert caught.value.path == str(path / "adapter_model.safetensors")
    assert UP1 in caught.value.key and caught.value.reason == "math-a: has NaN or Inf"
    assert not (tmp_path / "cal").exists()


def test_a_derivative_that_overflows_is_named(tmp_path, base, data):
    adapter(tmp_path, alpha=1e40)  # beyond float32
    with pytest.raises(InputError) as caught:
        calibrate(base, data, tmp_path / "cal", adapters=tmp_path / "zoo")
    assert caught.value.key == "phi_data.base:math"
    assert caught.value.reason == "is NaN or Inf along math-a"
    assert not (tmp_path / "cal").exists()


def test_a_module_that_is_not_fed_as_expected_is_named(tmp_path, base, data):
    adapter(tmp_path)
    up = base.model.layers[1].mlp.up_proj
    mlp = base.model.layers[1].mlp
    forward = mlp.forward
    for broken, reason in (
        (lambda x: forward(x) + 0 * up(x).sum(), "is called more than once for one text"),
        (lambda x: x, "was not called for sequence 0 of domain 'math'"),
        (lambda x: forward(x[:, :2]).sum(1, keepdim=True) + 0 * x, "is not fed every token"),
        (lambda x: (lambda h: forward(h) + 0 * h.add_(1))(x.clone()), "is changed in place"),
    ):
        base.requires_grad_(False)  # so that torch keeps no input of its own
        mlp.forward = broken
        with pytest.raises(InputError) as caught:
            calibrate(base, data, tmp_path / "cal", adapters=tmp_path / "zoo", modules=[Q0])
        assert caught.value.key == UP1 and reason in caught.value.reason
        assert not (tmp_path / "cal").exists()


def test_a_fingerprint_is_of_what_is_added(tmp_path, rng):
    def made(name: str, **arguments: object) -> str:
        return fingerprint(open_adapter(adapter(tmp_path, name, **arguments)))

    same = made("a", seed=3)
    assert same == made("b", seed=3, config={"lora_dropout": 0.5}) and len(same) == 64
    others = {
        made("c", seed=4), made("d", seed=3, alpha=7), made("e", seed=3, dtype="BF16"),
        made("f", seed=3, modules={Q0: SIZES[Q0]}),
        made("g", seed=3, modules={Q0.replace("q_", "o_"): SIZES[Q0], UP1: SIZES[UP1]}),
    }  # fmt: skip
    assert len(others) == 5 and same not in others
    path = adapter(tmp_path, "a", seed=3)
    file = path / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert fingerprint(open_adapter(path)) != same
