"""A zoo: adapters of one base model, opened lazily, and the table that kernels work from."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mergeprobe_fast.agreement import common_base, common_naming, is_merged, strangers
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import find_adapters, natural, text
from mergeprobe_fast.io import kohya
from mergeprobe_fast.io.adapter import AdapterRef, FileStamp, ModuleKind
from mergeprobe_fast.io.formats import default_name, is_adapter, open_adapter


class Module(NamedTuple):
    """One adapted layer of the base model, as all adapters that have it agree."""

    name: str
    kind: ModuleKind
    d_out: int
    d_in: int
    conv_shape: tuple[int, int, int] | None = None  # (in, kernel height, kernel width)

    @property
    def layer(self) -> str:
        """The block it belongs to: the path up to its first number, or its first part."""
        if kohya.is_key(f"{self.name}."):  # underscores where others have dots
            match = re.match(r".*?_\d+(?=_|$)", self.name)
        else:
            match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", self.name)
        return match.group() if match else self.name.split(".")[0]


class Skipped(NamedTuple):
    """An adapter left out because of ``skip_bad``, and why."""

    path: Path
    reason: str


ENTRY = np.dtype(
    [
        ("module", np.int32),
        ("adapter", np.int32),
        ("rank", np.int64),
        ("scale", np.float64),
        ("a_file", np.int32),
        ("b_file", np.int32),
        ("a_dtype", np.int32),
        ("b_dtype", np.int32),
        ("a_offset", np.int64),
        ("b_offset", np.int64),
        ("a_nbytes", np.int64),
        ("b_nbytes", np.int64),
    ]
)


@dataclass(frozen=True, eq=False)
class ProblemTable:
    """Where each (module, adapter) pair's factors lie; sorted by module, then adapter.

    A module that an adapter lacks has no row. Nothing is read, stacked or copied.
    """

    entries: np.ndarray  # of ENTRY
    module_bounds: np.ndarray  # (modules + 1,) rows of each module
    files: list[FileStamp]


class Zoo(Sequence[AdapterRef]):
    """Adapters that share a base model. Indexing gives an :class:`AdapterRef`.

    Attributes:
        root: the folder it was opened from, or None for a list of paths.
        adapters: the adapters, sorted by name when they come from a folder, else as listed.
        modules: every module any of them adapts, in natural order of their paths.
        notes: what a reader of a report should know.
        skipped: what ``skip_bad`` left out.
    """

    def __init__(
        self,
        adapters: Sequence[AdapterRef],
        *,
        root: Path | None = None,
        same_base: bool = False,
        notes: Iterable[str] = (),
        skipped: Iterable[Skipped] = (),
    ) -> None:
        self.root = root
        self.adapters = tuple(adapters)
        self.skipped = tuple(skipped)
        self._same_base, self._notes = same_base, tuple(notes)
        common_naming(self.adapters)
        self.base_model, base_notes = common_base(self.adapters, same_base)
        self.modules = _common_modules(self.adapters)
        own = (f"{a.name}: {note}" for a in self.adapters for note in a.notes)
        self.notes = (*self._notes, *base_notes, *strangers(self.adapters), *own)

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, index):
        return self.adapters[index]

    def __repr__(self) -> str:
        return f"<Zoo of {len(self)} adapters, {len(self.modules)} modules, {self.base_model}>"

    def without(self, error: InputError) -> Zoo:
        """The zoo less the adapter that ``error`` names, which goes to ``skipped``.

        Raises ``error`` itself when it names none of them, or the only one.
        """
        named = Path(error.path or "")
        bad = [a for a in self.adapters if a.path == named or a.path in named.parents]
        if not bad or len(self.adapters) == 1:
            raise error
        return Zoo(
            [a for a in self.adapters if a is not bad[0]],
            root=self.root,
            same_base=self._same_base,
            notes=self._notes,
            skipped=[*self.skipped, Skipped(bad[0].path, str(error))],
        )

    @property
    def names(self) -> list[str]:
        return [a.name for a in self.adapters]

    @cached_property
    def table(self) -> ProblemTable:
        """The problem table of all adapters."""
        from mergeprobe_fast.ops._tables import DTYPE_CODE

        module_index = {m.name: i for i, m in enumerate(self.modules)}
        files: dict[FileStamp, int] = {}
        rows = []
        for i, adapter in enumerate(self.adapters):
            for name, m in adapter.modules.items():
                rows.append(
                    (
                        module_index[name], i, m.rank, m.scale,
                        files.setdefault(m.a.file, len(files)),
                        files.setdefault(m.b.file, len(files)),
                        DTYPE_CODE[m.a.dtype], DTYPE_CODE[m.b.dtype],
                        m.a.offset, m.b.offset, m.a.nbytes, m.b.nbytes,
                    )
                )  # fmt: skip
        entries = np.array(rows, ENTRY)
        entries = entries[np.lexsort((entries["adapter"], entries["module"]))]
        bounds = np.searchsorted(entries["module"], np.arange(len(self.modules) + 1))
        return ProblemTable(entries, bounds.astype(np.int64), list(files))


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def as_zoo(zoo: Zoo | Paths) -> Zoo:
    """A zoo as it is, or opened from paths."""
    return zoo if isinstance(zoo, Zoo) else open_zoo(zoo)


def open_zoo(
    paths: Paths,
    *,
    same_base: bool = False,
    skip_bad: bool = False,
) -> Zoo:
    """Open a folder of adapters, or a list of adapters and folders; reads headers only.

    An adapter is a PEFT folder, or a kohya or diffusers ``.safetensors`` file. A folder is searched
    recursively; an adapter's own sub-folders (training checkpoints) are not, and are listed in
    ``notes``. Names are paths relative to the folder, files without ``.safetensors``.

    Args:
        same_base: take adapters that declare different base models for the same one (names are
            free text: paths, repacks). Shapes that disagree are an error all the same.
        skip_bad: go on without adapters that cannot be used; they are listed in ``skipped``.

    Raises:
        InputError: nothing found, an adapter that cannot be used, two bases, shapes that disagree,
            formats whose module names cannot be matched.
    """
    single = isinstance(paths, (str, os.PathLike))
    listed = [Path(p) for p in ([paths] if single else paths)]
    found: list[tuple[str, Path]] = []
    notes: list[str] = []
    walk_of: dict[Path, int] = {}  # which listed folder a found adapter came from
    for number, path in enumerate(listed):
        if is_adapter(path) or not path.is_dir():
            found.append((default_name(path) or str(path), path))
        else:
            inside = find_adapters(path, notes)
            walk_of.update((folder, number) for _, folder in inside)
            found += inside
    if not found:
        raise InputError("no adapters given")
    names = _unique_names(found)
    adapters, skipped = [], []
    seen: dict[Path, tuple[str, Path]] = {}
    for name, (_, path) in zip(names, found, strict=True):
        real = path.resolve()
        if real in seen:
            known, where = seen[real]
            if where == path or walk_of.get(path, -1) != walk_of.get(where, -2):
                raise InputError(f"is given twice (already as {known!r})", path=path)
            # Two links in one folder: "latest" beside the run it points to.
            what = "folder" if path.is_dir() else "file"
            notes.append(f"{name}: the same {what} as {known}, taken once")
            continue
        seen[real] = (name, path)
        try:
            adapters.append(open_adapter(path, name=name))
        except InputError as error:
            if not skip_bad:
                raise
            skipped.append(Skipped(path, str(error)))
    root = listed[0] if single and listed[0].is_dir() else None
    notes += (
        f"{a.name}: itself the result of a merge (merge.json)"
        for a in adapters
        if len(adapters) > 1 and is_merged(a)
    )
    while True:
        if not adapters:
            raise InputError(
                f"none of {len(skipped)} adapters can be used; first: {skipped[0].reason}"
            )
        try:
            return Zoo(adapters, root=root, same_base=same_base, notes=notes, skipped=skipped)
        except InputError as error:
            odd = [a for a in adapters if os.fspath(a.path) == error.path]
            if not skip_bad or not odd or len(adapters) <= 2:  # of two, neither is the odd one
                raise
            adapters.remove(odd[0])
            skipped.append(Skipped(odd[0].path, str(error)))


def _unique_names(found: Sequence[tuple[str, Path]]) -> list[str]:
    """Short names where they are unique, else the paths."""
    count = Counter(name for name, _ in found)
    return [text(name if count[name] == 1 else path.as_posix()) for name, path in found]


def short_labels(paths: Sequence[str]) -> list[str]:
    """Module paths without what all of them start with: model.layers.0, model.layers.1: 0, 1."""
    parts = [path.split(".") for path in paths]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]


def _common_modules(adapters: Sequence[AdapterRef]) -> tuple[Module, ...]:
    """Every module, as all adapters that have it agree; the odd one out is to blame."""
    alike: dict[int, list[AdapterRef]] = {}  # adapters of one recipe: looked at once
    for adapter in adapters:
        plan = getattr(adapter.modules, "plan", adapter.modules)
        alike.setdefault(id(plan), []).append(adapter)
    shapes: dict[str, dict[Module, list[AdapterRef]]] = {}
    for group in alike.values():
        for name, m in group[0].modules.items():
            conv = m.a.shape[1:] if m.kind == "conv2d" else None
            module = Module(name, m.kind, m.d_out, m.d_in, conv)
            shapes.setdefault(name, {}).setdefault(module, []).extend(group)
    for name, variants in shapes.items():
        if len(variants) > 1:
            usual = max(variants, key=lambda v: len(variants[v]))
            odd = next(v for v in variants if v != usual)
            raise InputError(
                f"{_shape(odd)} here, {_shape(usual)} in {variants[usual][0].name!r}: "
                "not the same base model",
                path=variants[odd][0].path,
                key=name,
            )
    return tuple(next(iter(shapes[name])) for name in sorted(shapes, key=natural))


def _shape(m: Module) -> str:
    d_in = m.d_in if m.conv_shape is None else "x".join(map(str, m.conv_shape))
    return f"{m.kind} {m.d_out} x {d_in}"
