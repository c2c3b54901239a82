"""Base model folders for tests, made without torch, and merges into them defined densely."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adapters import MadeAdapter

from mergeprobe_fast.io import safetensors
from mergeprobe_fast.io.dtypes import STORAGE, from_float, to_f32

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16,
         "tie_word_embeddings": False}  # fmt: skip
# Precision in bits and least exponent of a normal number.
FORMAT = {"F32": (24, -126), "BF16": (8, -126), "F16": (11, -14)}

Tensors = Mapping[str, tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], np.ndarray]]


def make_base(
    folder: str | Path, tensors: Tensors, *, seed: int = 0, shards: int = 1,
    config: Mapping[str, Any] = LLAMA, magnitude: float = 0.05,
) -> Path:  # fmt: skip
    """Write config.json, tokenizer files and weights; tensor bytes are drawn unless given.

    ``tensors`` maps a key to (dtype, shape), or with the storage array as third. With several
    ``shards`` the tensors go round them in turn, as an index says.
    """
    path = Path(folder)
    path.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    drawn = {key: _drawn(value, generator, magnitude) for key, value in tensors.items()}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n', "utf-8")
    (path / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    metadata = {"format": "pt"}
    if shards == 1:
        safetensors.write(path / "model.safetensors", drawn, metadata)
        return path
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(drawn)}
    for name in names:
        inside = {key: value for key, value in drawn.items() if where[key] == name}
        safetensors.write(path / name, inside, metadata)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return path


def _drawn(value: Any, generator: np.random.Generator, magnitude: float) -> Any:
    if len(value) == 3:
        return value
    dtype, shape = value
    if dtype in FORMAT:
        return dtype, shape, from_float(generator.standard_normal(shape) * magnitude, dtype)
    bits = generator.integers(0, 256, np.prod(shape, dtype=int) * STORAGE[dtype].itemsize)
    return dtype, shape, bits.astype(np.uint8)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """Every F32, BF16 or F16 tensor of a model folder, widened to float64."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        for key, ref in safetensors.read_header(path).tensors.items():
            if ref.dtype in FORMAT:
                raw = np.frombuffer(content, STORAGE[ref.dtype], offset=ref.offset,
                                    count=ref.nbytes // STORAGE[ref.dtype].itemsize)  # fmt: skip
                found[key] = to_f32(raw, ref.dtype).reshape(ref.shape).astype(np.float64)
    return found


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a model folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        for key, ref in safetensors.read_header(path).tensors.items():
            found[key] = content[ref.offset : ref.offset + ref.nbytes]
    return found


def headers(folder: Path) -> dict[str, bytes]:
    """The bytes before the tensors of every weight file."""
    contents = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return {name: c[: 8 + int.from_bytes(c[:8], "little")] for name, c in contents.items()}


def half_ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """Half the distance of two neighbours of a format, at each value."""
    precision, least = FORMAT[dtype]
    _, exponents = np.frexp(np.abs(values))
    return np.ldexp(0.5, np.maximum(exponents - 1, least) - precision + 1)


def as_stored(delta: np.ndarray, kind: str, shape: tuple[int, ...], flipped: bool) -> np.ndarray:
    """A (d_out, d_in) delta as it lies in the base: PEERS' dW conventions."""
    return (delta.T if kind == "embedding" or flipped else delta).reshape(shape)


def sums(adapters: Sequence[MadeAdapter], weights: Sequence[float]) -> dict[str, Any]:
    """Per module: sum_i w_i s_i B_i A_i, the same over absolute values, and the kind; float64."""
    found: dict[str, Any] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, m in adapter.modules.items():
            delta, size, _ = found.get(name, (0.0, 0.0, m.kind))
            size = size + abs(weight * m.scale) * (np.abs(m.b) @ np.abs(m.a))
            found[name] = delta + weight * m.delta, size, m.kind
    return found


def written_bound(exact: np.ndarray, size: np.ndarray, dtype: str) -> np.ndarray:
    """|written - (base + delta)|: one rounding to ``dtype``, and that of the float32 factors.

    BF16 is reached by way of float32: another 2^-16 of its half ulp. The weighted scale is rounded
    into B once, U32 of |B||A|; float64 sums of a few hundred terms: 2^-44 of all sizes.
    """
    rounding = half_ulp(exact, dtype) * (1 + (2.0**-15 if dtype == "BF16" else 0.0))
    return rounding * (1 + 2.0**-20) + 2.0**-24 * size + 2.0**-44 * (size + np.abs(exact))
