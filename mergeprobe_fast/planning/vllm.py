"""What vLLM is started with to serve a folder of adapters.

From vllm/config/lora.py and vllm/entrypoints/openai/cli_args.py (0.10 to 0.27): the ranks it
allocates, and ``--lora-modules`` as JSON. It reads r, lora_alpha and use_rslora of a config and no
rank_pattern or alpha_pattern (vllm/lora/peft_helper.py).
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.peft import WEIGHTS_NAME

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank


def max_lora_rank(rank: int) -> int | None:
    """The smallest rank that vLLM can allocate for adapters of this one; None: there is none."""
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def reads_as_it_is(adapter: AdapterRef) -> bool:
    """Whether PEFT and vLLM get the right update from this adapter's own files.

    One weight file of PEFT's name, and one scale for all modules, which the config gives without
    patterns.
    """
    files = {factor.file for m in adapter.modules.values() for factor in (m.a, m.b)}
    if adapter.format != "peft" or [file.path.name for file in files] != [WEIGHTS_NAME]:
        return False
    r, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        return False
    scale = alpha / (math.sqrt(r) if adapter.config.get("use_rslora") else r)
    return all(
        m.rank <= r and math.isclose(m.scale, scale, rel_tol=1e-12)
        for m in adapter.modules.values()
    )


def arguments(
    adapters: Iterable[tuple[str, str, int]], base_model: str | None, above: str = ""
) -> list[str] | None:
    """The arguments after ``vllm serve BASE``; None when a rank is larger than vLLM's largest.

    Args:
        adapters: (name, path of its folder, rank) of each.
        above: what to put before the paths.
    """
    adapters = list(adapters)
    rank = max_lora_rank(max(rank for *_, rank in adapters))
    if rank is None:
        return None
    named = {} if base_model is None else {"base_model_name": base_model}
    modules = [
        json.dumps({"name": name, "path": os.path.join(above, path), **named}, ensure_ascii=False)
        for name, path, _ in adapters
    ]
    return ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank),
            "--lora-modules", *modules]  # fmt: skip


def command(
    adapters: Iterable[tuple[str, str, int]], base_model: str | None, folder: Path
) -> str | None:
    """A line for a shell, with absolute paths; None as :func:`arguments`."""
    found = arguments(adapters, base_model, os.path.abspath(folder))
    if found is None:
        return None
    return shlex.join(["vllm", "serve", _base(base_model) or "BASE", *found])


def script(adapters: Iterable[tuple[str, str, int]], base_model: str | None) -> str | None:
    """A shell script that may move with the folder; None as :func:`arguments`."""
    found = arguments(adapters, base_model)
    if found is None:
        return None
    base = _base(base_model)
    if base is None:
        base = ': "${BASE:?name the base model: BASE=... sh vllm.sh}"'
    else:
        base = f"[ -n \"${{BASE:-}}\" ] || BASE={shlex.quote(base)}"
    split = found.index("--lora-modules")
    fixed, modules = found[:split], found[split + 1 :]
    lines = [
        "#!/bin/sh",
        "# Serves the adapters of this folder; BASE=... names another base model or its folder,",
        "# and arguments go to vllm: sh vllm.sh --port 8001",
        base,
        'cd -- "$(dirname -- "$0")" || exit 1',
        f'exec vllm serve "$BASE" {shlex.join(fixed)} "$@" --lora-modules \\',
        " \\\n".join(f"  {shlex.quote(module)}" for module in modules),
    ]
    return "\n".join(lines) + "\n"


def _base(base_model: str | None) -> str | None:
    """A folder by its absolute path: the script changes the current one."""
    if base_model is None or not os.path.isdir(base_model):
        return base_model
    return os.path.abspath(base_model)
