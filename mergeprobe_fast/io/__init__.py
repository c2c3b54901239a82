"""Formats in and out. Opening reads and checks headers; no weight is read here."""

from __future__ import annotations

from .adapter import AdapterRef, FactorRef, FileStamp, ModuleKind, ModuleRef
from .atomic import AtomicFolder, is_temporary
from .atomic_file import AtomicFile
from .coverage import Coverage, check
from .dtypes import bf16_to_f32, f32_to_bf16
from .formats import is_adapter, open_adapter
from .peft_writer import RoundedModule, WrittenModule, write_adapter
from .safetensors import SafetensorsHeader, read_header
from .single_file_writer import write_diffusers, write_kohya, write_like

__all__ = [
    "AdapterRef",
    "AtomicFile",
    "AtomicFolder",
    "Coverage",
    "FactorRef",
    "FileStamp",
    "ModuleKind",
    "ModuleRef",
    "RoundedModule",
    "SafetensorsHeader",
    "WrittenModule",
    "bf16_to_f32",
    "check",
    "f32_to_bf16",
    "is_adapter",
    "is_temporary",
    "open_adapter",
    "read_header",
    "write_adapter",
    "write_diffusers",
    "write_kohya",
    "write_like",
]
