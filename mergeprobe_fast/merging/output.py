"""Writing a merged adapter in the format of its inputs: a PEFT folder, or one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mergeprobe_fast
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic import AtomicFolder
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.peft_writer import RoundedModule, WrittenModule, write_adapter
from mergeprobe_fast.io.single_file import MERGE_KEY
from mergeprobe_fast.io.single_file_writer import check_like, write_like
from mergeprobe_fast.merging.methods import MergedModule
from mergeprobe_fast.zoo import Zoo

REPORT_NAME = "merge.json"
CONTENTS = ("adapter_config.json", "adapter_model.safetensors", REPORT_NAME)
SUFFIX = ".safetensors"

Report = dict[str, Any]


def check_output(zoo: Zoo, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise what ``MergedAdapter.save`` would refuse about ``out``, before any work is done."""
    if _is_file(zoo, out):
        check_like(out, zoo.adapters)
        for file in _files(zoo, out, overwrite):
            file.check()
    else:
        _folder(zoo, out, overwrite).check()


def write(
    zoo: Zoo,
    out: str | os.PathLike[str],
    modules: Sequence[MergedModule],
    dtype: str,
    report: Callable[[dict[str, RoundedModule]], Report],
    *,
    overwrite: bool,
) -> Report:
    """Write the modules and ``report`` of what was written; returns the latter.

    Both are complete before either gets its name.
    """
    check_output(zoo, out, overwrite=overwrite)
    if _is_file(zoo, out):
        weights, beside = _files(zoo, out, overwrite)
        summary = {
            "tool": f"mergeprobe_fast {mergeprobe_fast.__version__}",
            "adapters": len(zoo),
            "report": beside.out.name,
        }
        content: Report = {}
        with beside as temporary:

            def describe(written: dict[str, RoundedModule]) -> None:
                content.update(report(written))
                _write_json(temporary, content)

            write_like(
                weights.out, zoo.adapters, _written(zoo, modules), dtype=dtype,
                overwrite=overwrite, metadata={MERGE_KEY: json.dumps(summary)}, before=describe,
            )  # fmt: skip
        return content
    with _folder(zoo, out, overwrite) as temporary:
        written = write_adapter(
            temporary,
            base_model=zoo.base_model,
            modules=_written(zoo, modules),
            dtype=dtype,
            task_type=_agreed(zoo, "task_type"),
            revision=_agreed(zoo, "revision"),
        )
        content = report(written)
        _write_json(temporary / REPORT_NAME, content)
    return content


def _is_file(zoo: Zoo, out: str | os.PathLike[str]) -> bool:
    """Whether one file is to be written; InputError where nothing could load that."""
    named = os.fspath(out).endswith(SUFFIX)
    odd = next((a for a in zoo if a.config.get("naming", "path") != "path"), None)
    if odd is not None and not named:
        reason = f"{odd.name} is a {odd.format} file, and so is the merge: name a {SUFFIX} file"
        raise InputError(reason, path=out)
    return named


def _files(
    zoo: Zoo, out: str | os.PathLike[str], overwrite: bool
) -> tuple[AtomicFile, AtomicFile]:
    """The weights, and the report beside them."""
    path = Path(out)
    inputs = [a.path for a in zoo]
    beside = path.with_name(f"{path.name.removesuffix(SUFFIX)}.{REPORT_NAME}")
    return AtomicFile(path, overwrite, inputs=inputs), AtomicFile(beside, overwrite)


def _folder(zoo: Zoo, out: str | os.PathLike[str], overwrite: bool) -> AtomicFolder:
    return AtomicFolder(out, overwrite, inputs=[a.path for a in zoo], contents=CONTENTS)


def _written(zoo: Zoo, modules: Sequence[MergedModule]) -> Iterator[WrittenModule]:
    flags = {name for a in zoo for name, m in a.modules.items() if m.fan_in_fan_out}
    for m in modules:
        yield WrittenModule(
            m.module.name, m.module.kind, m.a, m.b, 1.0, m.module.conv_shape,
            m.module.name in flags,
        )  # fmt: skip


def _agreed(zoo: Zoo, key: str) -> Any:
    values = {json.dumps(a.config.get(key)) for a in zoo}
    return json.loads(values.pop()) if len(values) == 1 else None


def _write_json(path: Path, content: Report) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
