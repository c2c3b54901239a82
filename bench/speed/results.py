"""Rows of speed.jsonl, and what is known about the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cases import OURS, Fact, Measured, Target, Variant
from gate import git
from harness import REPOSITORY

# A virtual environment with gradience and adaptersentry, whose pins would clash with ours.
PEERS_PYTHON = Path(os.environ.get("MERGEPROBE_BENCH_PEERS", ".venv-peers")) / "bin/python"


@cache
def machine() -> dict[str, Any]:
    """CPU model, cores and caches, from Linux."""
    text = Path("/proc/cpuinfo").read_text()
    found = {k: re.search(rf"^{k}\s*: (.*)$", text, re.M) for k in
             ("model name", "cpu family", "model", "flags")}  # fmt: skip
    flags = (found["flags"].group(1) if found["flags"] else "").split()
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / f).read_text().strip() for f in ("level", "type"))
        caches[f"L{level} {kind.lower()}"] = (index / "size").read_text().strip()
    return {
        "cpu": found["model name"].group(1) if found["model name"] else platform.processor(),
        "family_model": "/".join(
            found[k].group(1) if found[k] else "?" for k in ("cpu family", "model")
        ),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches,
        "sets": [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }


def cpu_slug() -> str:
    """The machine as a folder name."""
    m = machine()
    text = f"{m['cpu']} {m['family_model']} {m['cores']}c"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@cache
def versions() -> dict[str, str]:
    """Python, libraries and compilers."""
    import torch

    from mergeprobe_fast import _native

    out = {"python": platform.python_version()}
    for name in ("numpy", "torch", "peft", "pytest-benchmark"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "-"
    site = PEERS_PYTHON.parent.parent / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    for name in ("gradience", "adaptersentry"):
        found = list((site / "site-packages").glob(f"{name}-*.dist-info"))
        out[name] = found[0].name.split("-")[1].removesuffix(".dist") if found else "-"
    info = _native.core().build_info()
    return {
        **out,
        "compiler": str(info.get("compiler", "-")),
        "isa": _native.isa(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
    }


@cache
def provenance() -> dict[str, Any]:
    """The part that all rows of a run share."""
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain")),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


def rows(
    measured: Measured, *, gated: bool, quick: bool, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row per variant, then one per fact."""
    case = measured.case
    shared = {} if device == "cpu" else {"device": _device().machine()}
    shared |= {
        "suite": case.suite, "case": case.name, "threads": case.threads, "clock": case.clock,
        "gated": gated, "quick": quick, **provenance(),
    }  # fmt: skip
    out = [{**_timing(measured, v), **shared} for v in case.variants]
    return out + [{**_fact(f), **shared} for f in measured.facts]


def _timing(measured: Measured, v: Variant) -> dict[str, Any]:
    case, median = measured.case, measured.medians[v.name]
    compared = v.compare and v is not case.ours
    rate = v.work is not None and case.ours.work is not None
    return {
        "kind": "time",
        "variant": v.name,
        "peer": v.peer,
        "samples": measured.samples[v.name],
        "median": median,
        "unit": "s",
        "gflops": v.work / median / 1e9 if v.work else None,
        "against": case.ours.name if compared else None,
        "ratio": measured.ratios[v.name] if compared else None,
        "ratio_unit": "of its rate" if rate else "x faster",
        "extrapolated": v.extrapolated,
        "note": v.note,
        **_target(v.target, measured.ratios[v.name], "ratio"),
        **({} if v.target else _target(v.time_target, median, "median")),
    }


def _fact(f: Fact) -> dict[str, Any]:
    return {
        "kind": "fact", "variant": f.name, "peer": f.peer, "samples": [], "median": f.value,
        "unit": f.unit, "ratio": None, "against": None, "extrapolated": False, "note": f.note,
        **_target(f.target, f.value, "median"),
    }  # fmt: skip


def _target(target: Target | None, number: float, of: str) -> dict[str, Any]:
    if target is None:
        return {"target": None, "target_of": None, "met": None}
    sign = ">=" if target.at_least else "<="
    return {"target": f"{sign} {target.value:g}", "target_of": of, "met": target.met(number)}


def default_path(device: str = "cpu") -> Path:
    """bench/results/<cpu or device>/speed.jsonl"""
    slug = cpu_slug() if device == "cpu" else _device().slug()
    return REPOSITORY / "bench" / "results" / slug / "speed.jsonl"


def _device() -> Any:
    import device

    return device


def append(path: Path, new: list[dict[str, Any]]) -> None:
    """Add rows to a file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for row in new:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


__all__ = ["OURS", "PEERS_PYTHON", "append", "cpu_slug", "default_path", "machine", "rows"]
