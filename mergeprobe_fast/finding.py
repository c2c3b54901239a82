"""Which adapters lie below a folder, and in what order."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic import is_temporary
from mergeprobe_fast.io.formats import is_adapter
from mergeprobe_fast.io.single_file import SUFFIX

_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")


def find_adapters(root: Path, notes: list[str]) -> list[tuple[str, Path]]:
    """(relative path, path) of the adapters below ``root``, in natural order.

    What was passed over is added to ``notes``. InputError when there is none.
    """
    inside: list[tuple[str, Path]] = []
    _walk(root, root, tuple(root.resolve().parents), inside, notes)
    if not inside:
        stray = "; it holds weight files that are no adapters" if notes else ""
        reason = f"no adapters in this folder (adapter_config.json, LoRA .safetensors){stray}"
        raise InputError(reason, path=root)
    return sorted(inside, key=lambda item: natural(item[0]))


def _walk(
    root: Path, here: Path, above: tuple[Path, ...], inside: list[tuple[str, Path]],
    notes: list[str],
) -> None:  # fmt: skip
    """Collect the adapters below ``here``; ``above`` are the real paths of the folders it is in."""
    try:
        entries = sorted(os.scandir(here), key=lambda e: natural(e.name))
    except OSError as error:
        raise InputError(error.strerror or str(error), path=here) from error
    entries = [e for e in entries if not is_temporary(e.path)]
    folders = [Path(e.path) for e in entries if _is_folder(e)]
    files = [e for e in entries if e.name.endswith(_WEIGHTS) and not _is_folder(e)]
    relative = here.relative_to(root).as_posix()
    if is_adapter(here):
        nested = sum(is_adapter(folder) for folder in folders)
        if nested:
            notes.append(
                f"{relative}: {nested} adapters in its sub-folders (checkpoints?) were not opened; "
                "list them by path to include them"
            )
        beside = sum(is_adapter(e.path) for e in files)
        if beside:
            notes.append(
                f"{relative}: {beside} LoRA files beside the PEFT adapter were not opened; "
                "list them by path to include them"
            )
        inside.append((relative, here))
        return
    stray = []
    for e in files:
        if is_adapter(e.path):
            path = Path(e.path)
            inside.append((path.relative_to(root).as_posix().removesuffix(SUFFIX), path))
        else:
            stray.append(e.name)
    if stray:
        shown = ", ".join(stray[:3]) + (" ..." if len(stray) > 3 else "")
        notes.append(
            f"{here}: {len(stray)} weight files outside PEFT folders hold no LoRA that can be "
            f"read and were not opened: {text(shown)}"
        )
    real = here.resolve()
    for folder in folders:
        # A link to a folder that it lies in would be walked for ever.
        if folder.is_symlink() and folder.resolve() in (*above, real):
            continue
        _walk(root, folder, (*above, real), inside, notes)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def text(path: str | os.PathLike[str]) -> str:
    """A path as valid Unicode: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layers.2 before layers.10."""
    parts = (part for part in re.split(r"(\d+)", text) if part)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
