"""Items of public data sets: from a folder of one's own, or fetched where that is asked for.

Nothing of these sets is part of this package, and nothing is fetched unless :func:`fetch` is
called. A folder has one folder for each set, whose files are those that the sets are published as:

    gsm8k/train.jsonl gsm8k/test.jsonl      sciq/train.jsonl sciq/test.jsonl
    mbpp/mbpp.jsonl                         arc/train.jsonl arc/test.jsonl
    humaneval/HumanEval.jsonl               alpaca/alpaca_data.json
    saferlhf/train.jsonl                    dolly/databricks-dolly-15k.jsonl
    xstest/xstest_prompts.csv               ifeval/input_data.jsonl

Each may be .jsonl, .json (a list) or .csv, and .gz besides.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import AtomicFile

from ..tasks.item import Item
from ..tasks.leaks import normalised
from ..tasks.splits import split_of
from ..tasks.words import SPLITS, Split
from .code import LeftOut, passing
from .layouts import SETS, PublicSet

_ENDINGS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_ORDER: tuple[Split, ...] = ("test", "calibration", "train")  # who keeps what two splits have
_MOST_CHARACTERS = 2000  # of a prompt and its answers: longer items are left out


@dataclass(frozen=True)
class ExamItems:
    """What some sets have for an exam.

    ``left_out`` is why rows are no items: a reason and the places it holds for.
    """

    items: Mapping[Split, Mapping[str, tuple[Item, ...]]]  # by split and set
    left_out: Mapping[str, tuple[str, ...]]

    def count(self, split: Split) -> int:
        """How many items a draw can have at most."""
        return sum(len(_shuffled(items, "")) for items in self.items[split].values())


@cache
def read(folder: str, names: tuple[str, ...]) -> ExamItems:
    """All items of some sets of one exam; no question is in two splits or occurs twice.

    Test files are for test, three sixteenths of the others for calibration, by what they ask; sets
    that have no test file are cut in three in the same way.

    Raises:
        InputError: no such set, files that are missing or wrong, by file and line.
    """
    left_out: dict[str, list[str]] = {}
    found: dict[Split, dict[str, list[Item]]] = {split: {} for split in SPLITS}
    for name in names:
        if name not in SETS:
            raise InputError(f"{name!r} is none of {', '.join(SETS)}", key="data")
        for split, item in _items(Path(folder), name, left_out):
            found[split].setdefault(name, []).append(item)
    seen: set[object] = set()
    for split in _ORDER:
        for name, items in found[split].items():
            kept = []
            for item in items:
                identities = _identities(item)
                if seen.isdisjoint(identities):
                    kept.append(item)
                else:
                    left_out.setdefault("asks what another item asks", []).append(
                        f"{name}: {item.key[:60]}"
                    )
                seen.update(identities)
            found[split][name] = kept
    return ExamItems(
        {split: {n: tuple(items) for n, items in sets.items() if items}
         for split, sets in found.items()},
        {reason: tuple(places) for reason, places in left_out.items()},
    )  # fmt: skip


def draw(
    folder: str | os.PathLike[str], domain: str, names: Sequence[str], split: Split, count: int,
    seed: int,
) -> list[Item]:  # fmt: skip
    """``count`` items of a split, the sets that have any left taking turns.

    The same arguments and files give the same items.

    Raises:
        InputError: as :func:`read`; a set of another domain; fewer items than asked for.
    """
    for name in names:
        if name in SETS and SETS[name].domain != domain:
            raise InputError(f"is a set of {SETS[name].domain}, not of {domain}", key=name)
    have = read(os.fspath(folder), tuple(names)).items[split]
    if not have:
        raise InputError(f"{', '.join(names)}: nothing for the split {split}", path=folder)
    drawn = [_shuffled(items, f"{name}/{split}/{seed}") for name, items in have.items()]
    found = [i for i in chain.from_iterable(zip_longest(*drawn)) if i is not None][:count]
    if len(found) < count:
        reason = f"split {split} has only {len(found)} items of the {count} asked for"
        raise InputError(reason, path=folder, key=", ".join(names))
    return found


def fetch(name: str, folder: str | os.PathLike[str]) -> Path:
    """Fetch a set with the package ``datasets`` into a folder, in the layout read here.

    Raises:
        InputError: no such set, ``datasets`` is not installed, or it cannot load the set.
    """
    if name not in SETS:
        raise InputError(f"{name!r} is none of {', '.join(SETS)}", key="data")
    spec, target = SETS[name], Path(folder) / name
    try:
        import datasets
    except ImportError as error:
        raise InputError("pip install datasets; or put its files there", path=target) from error
    target.mkdir(parents=True, exist_ok=True)
    for split, stem in spec.hub_splits:
        try:
            rows = datasets.load_dataset(spec.hub, spec.config, split=split, revision=spec.revision)
        except Exception as error:  # whatever a network and a server can do
            raise InputError(f"{spec.hub} cannot be loaded: {error}", path=target) from error
        lines = (json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        with AtomicFile(target / f"{stem}.jsonl", overwrite=True) as path:
            path.write_text("".join(lines), encoding="utf-8")
    return target


def find(folder: str | os.PathLike[str], name: str) -> bool:
    """Whether a folder has a set."""
    return (Path(folder) / name).is_dir()


def _items(folder: Path, name: str, left_out: dict[str, list[str]]) -> Iterator[tuple[Split, Item]]:
    spec, found = SETS[name], []
    for stem, role in spec.files:
        path = _file(folder / name, stem)
        for number, row in _rows(path):
            place = f"{path.name} line {number}"
            _check_fields(spec, row, path, number)
            try:
                item = spec.item(row)
                texts = (item.prompt, *(item.options or (item.target,)))
                if sum(map(len, texts)) > _MOST_CHARACTERS:
                    raise LeftOut(f"is longer than {_MOST_CHARACTERS} characters")
            except LeftOut as reason:
                left_out.setdefault(str(reason), []).append(f"{name}: {place}")
                continue
            found.append((_split(spec.role(row) or role, name, item), item, place))
    code = [entry for entry in found if entry[1].kind == "code"]
    right = dict(zip((id(e[1]) for e in code), passing([e[1] for e in code]), strict=True))
    for split, item, place in found:
        if right.get(id(item), True):
            yield split, replace(item, source="calibration" if split == "calibration" else "train")
        else:
            reason = "its solution fails its tests in the sandbox"
            left_out.setdefault(reason, []).append(f"{name}: {place}")


def _split(role: str, name: str, item: Item) -> Split:
    drawn = split_of(name, item.key)
    if role == "all":
        return drawn
    return "test" if role == "test" else "calibration" if drawn == "calibration" else "train"


def _identities(item: Item) -> list[object]:
    """What no other item may have: as ``tasks.leaks`` looks at it."""
    found: list[object] = [item.prompt, (item.task, item.key), normalised(item.prompt)]
    if item.kind == "choice":
        found.append((frozenset(normalised(o) or o for o in item.options), item.target))
    return found


def _shuffled(items: Sequence[Item], seed: str) -> list[Item]:
    """In an order of the seed, the two sides of refusal items taking turns."""
    mixed = random.Random(seed).sample(items, len(items))
    sides = [[i for i in mixed if i.check.get("refuse") is side] for side in (True, False)]
    if not all(sides):
        return mixed
    return list(chain.from_iterable(zip(*sides, strict=False)))


def _file(folder: Path, stem: str) -> Path:
    for ending in _ENDINGS:
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    raise InputError(f"has no {stem}{_ENDINGS[0]}, nor another of {', '.join(_ENDINGS)}",
                     path=folder)  # fmt: skip


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows with their numbers from 1."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"cannot be read: {error}", path=path) from error
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".csv":
        return list(enumerate(csv.DictReader(io.StringIO(text)), start=1))
    try:
        if kind == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}", path=path) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("is not a list of JSON objects", path=path)
    return list(enumerate(rows, start=1))


def _check_fields(spec: PublicSet, row: Mapping[str, Any], path: Path, number: int) -> None:
    for field, kind in spec.fields.items():
        if not isinstance(row.get(field), kind):
            found = type(row[field]).__name__ if field in row else "missing"
            raise InputError(f"{field} is {found}", path=path, key=f"row {number}")
