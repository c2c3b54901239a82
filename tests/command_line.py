"""``cli.main`` called in the process, and adapters spoilt in the ways it must refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from adapters import make_adapter

from mergeprobe_fast import cli

WEIGHTS = "adapter_model.safetensors"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls ``cli.main`` with these words and returns the exit code and both streams."""

    def call(*words: Any) -> Ran:
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = stop.code
        return Ran(code, *capsys.readouterr())

    return call


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_refused(ran: Ran, *parts: str, code: int = 2) -> None:
    """Nothing on stdout, and on stderr one line with these parts."""
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    assert ran.err.startswith("mergeprobe-fast: ")
    assert "Traceback" not in ran.err
    for part in parts:
        assert part in ran.err


def spoil(folder: Path, how: str) -> str:
    """Break an adapter; returns what its error must say."""
    weights, config = folder / WEIGHTS, folder / "adapter_config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
        return f"{weights}: is truncated"
    if how == "dora":
        config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
        return f"{config}: use_dora: "
    if how == "config gone":
        config.unlink()
        return f"{folder}: has no adapter_config.json"
    if how == "half a pair":
        make_adapter(folder, extra={"base_model.model.x.lora_A.weight": np.ones((2, 3), "f4")})
        return f"{weights}: base_model.model.x.lora_A.weight: half a pair"
    if how == "NaN":
        name = "model.layers.0.self_attn.q_proj"
        make_adapter(folder, factors={name: (np.full((4, 10), np.nan), np.ones((12, 4)))})
        return f"{weights}: base_model.model.{name}.lora_A.weight: holds NaN"
    if how == "other base":
        make_adapter(folder, base_model="other/base")
        return f"{folder}: declares base model 'other/base'"
    assert how == "other shape"
    make_adapter(folder, modules={"model.layers.0.self_attn.q_proj": (12, 11, 4)})
    return f"{folder}: model.layers.0.self_attn.q_proj: linear 12 x 11 here, linear 12 x 10"
