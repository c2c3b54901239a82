"""What was built, which backend and instruction set is active, and why."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mergeprobe_fast
from mergeprobe_fast import _env, _native
from mergeprobe_fast.errors import MergeprobeError


def examine() -> dict[str, Any]:
    """Facts as plain JSON values; ``ok`` is False when the CPU kernels cannot run."""
    facts: dict[str, Any] = {
        "mergeprobe_fast": mergeprobe_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "packages": {name: _version(name) for name in ("numpy", "torch", "triton", "peft")},
    }
    try:
        core = _native.core()
        facts["build"] = dict(core.build_info())
        facts["threads"] = _env.default_threads()
        available = core.available_isas()
        chosen = _native.isa()
        why = "MERGEPROBE_ISA asks for it" if _env.pinned_isa() else "the widest this CPU has"
        facts["instruction_set"] = {"active": chosen, "why": why, "available": available}
        cpu = {"ok": True, "why": f"compiled module loaded, {chosen}: {why}"}
    except MergeprobeError as error:
        cpu = {"ok": False, "why": str(error)}
    facts["backends"] = {
        "cpu": cpu, "triton": _triton(), "cuda": _cuda(facts), "reference": _reference(),
    }  # fmt: skip
    facts["ok"] = cpu["ok"]
    return facts


def _reference() -> dict[str, Any]:
    return {"ok": True, "why": "float64 numpy, by name only"}


def _cuda(facts: dict[str, Any]) -> dict[str, Any]:
    """Whether the module of csrc/cuda can launch; what it was built with goes to ``facts``."""
    try:
        module = _native.cuda()
        built = facts["cuda_build"] = dict(module.build_info())
        why = f"compiled module, CUDA {built['toolkit']}, for {built['architectures']}"
        devices = module.devices()
    except MergeprobeError as error:
        built = facts.get("cuda_build")
        return {"ok": False, "why": f"{why}; {error}" if built else str(error)}
    if not devices:
        return {"ok": False, "why": f"{why}; the driver shows no device"}
    return {"ok": True, "why": f"{why}; {devices} device{'s' * (devices > 1)}"}


def _triton() -> dict[str, Any]:
    for name in ("torch", "triton"):
        if _version(name) is None:
            return {"ok": False, "why": f"{name} is not installed"}
    try:
        import torch
    except ImportError as error:
        return {"ok": False, "why": f"torch does not import: {error}"}
    if not torch.cuda.is_available():
        return {"ok": False, "why": f"torch {torch.__version__} sees no CUDA device"}
    return {"ok": True, "why": torch.cuda.get_device_name(0)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as info:
                for line in info:
                    if line.startswith("model name"):
                        return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
