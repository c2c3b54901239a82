"""Random adapters with a fixed seed: in memory, and as PEFT folders on disk.

Every adapter of a zoo is 0.6 * (a common adapter) + 0.8 * (its own): cosines are far from 0 and 1,
so that agreement between libraries means something. Gaussian factors have flat spectra.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mergeprobe_fast.io.calibration_json import CalibratedModule, CalibrationInfo, Domain
from mergeprobe_fast.io.calibration_writer import CalibrationWriter

Shapes = Mapping[str, tuple[int, int]]  # module -> (d_out, d_in)
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> A (r, d_in), B (d_out, r)

ALPHA_OVER_R = 0.5
COMMON, OWN = 0.6, 0.8


def llama_7b(layers: int = 32) -> Shapes:
    """The seven linear layers of each block of Llama-2-7B."""
    block = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (4096, 4096),
        "self_attn.v_proj": (4096, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (11008, 4096),
        "mlp.up_proj": (11008, 4096),
        "mlp.down_proj": (4096, 11008),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in
            block.items()}  # fmt: skip


def uniform(modules: int, d_out: int, d_in: int) -> Shapes:
    """``modules`` equal layers, four to a block."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        f"model.layers.{i // 4}.self_attn.{names[i % 4]}": (d_out, d_in) for i in range(modules)
    }


def small_model() -> Shapes:
    """144 square layers of width 768."""
    return uniform(144, 768, 768)


def adapters(
    count: int, shapes: Shapes, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Iterator[Factors]:
    """``count`` adapters, one at a time."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Factors:
        return {
            name: (
                torch.randn(rank, d_in, generator=generator).div_(d_in**0.5),
                torch.randn(d_out, rank, generator=generator).div_(10),
            )
            for name, (d_out, d_in) in shapes.items()
        }

    common = draw()
    for _ in range(count):
        own = draw()
        yield {
            name: tuple(
                f.mul_(OWN).add_(c, alpha=COMMON).to(dtype)
                for f, c in zip(own[name], common[name], strict=True)
            )
            for name in shapes
        }


def write_adapter(folder: Path, factors: Factors, rank: int) -> None:
    """One PEFT folder."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "bench/base",
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in factors}),
        "r": rank,
        "lora_alpha": rank * ALPHA_OVER_R,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_zoo(
    root: Path, count: int, shapes: Shapes, rank: int, dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Path]:  # fmt: skip
    """``count`` PEFT folders below ``root``, left in the page cache by having been written."""
    paths = []
    for i, factors in enumerate(adapters(count, shapes, rank, dtype, seed)):
        paths.append(root / f"adapter_{i:03d}")
        write_adapter(paths[-1], factors, rank)
    return paths


def size_of(paths: list[Path]) -> int:
    """Bytes of all files of some adapters."""
    return sum(f.stat().st_size for p in paths for f in p.iterdir())


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="mergeprobe-speed-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_calibration(
    folder: Path, shapes: Shapes, domains: Sequence[str], samples: int, seed: int = 0
) -> None:
    """A calibration in which q, k, v and gate, up share their inputs, as in a Llama block.

    Inputs are Gaussian with a few massive dimensions, as those of real models have them.
    """
    source = {
        name: name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        .replace("up_proj", "gate_proj") for name in shapes
    }  # fmt: skip
    info = CalibrationInfo(
        "bench/base", None, "0" * 64,
        {d: Domain(d, f"{d}.jsonl", "0" * 64, 8, samples, samples, ()) for d in domains},
        {n: CalibratedModule(n, shape[1], shape[0], source[n]) for n, shape in shapes.items()},
        seed=seed, samples=samples, max_length=512, skip_first=1, labels=None,
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    with CalibrationWriter(folder, info) as writer:
        for domain in domains:
            writer.sampled_tokens(domain, np.zeros(samples), np.arange(1, samples + 1))
            for name, (d_out, d_in) in shapes.items():
                writer.output_moment(domain, name, np.ones(d_out))
                if source[name] != name:
                    continue
                x = generator.standard_normal((samples, d_in), np.float32)
                x *= generator.lognormal(0, 1, d_in).astype(np.float32)
                x[:, generator.integers(d_in, size=4)] *= 100
                writer.inputs(domain, name, x)
                writer.moment(domain, name, np.square(x, dtype=np.float64).mean(axis=0))
