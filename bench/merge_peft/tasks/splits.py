"""Which split a question belongs to, and the data files."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from mergeprobe_fast.merge_peft.tasks.words import Split

DATA = Path(__file__).parents[1] / "data"
BUCKETS = 16
TEST_BUCKETS, CALIBRATION_BUCKETS = 4, 3


def split_of(task: str, key: str) -> Split:
    """The split of a question, from what it asks alone: the same for every seed and count.

    A quarter of the questions is for test, three sixteenths are for calibration.
    """
    bucket = zlib.crc32(f"{task}/{key}".encode()) % BUCKETS
    if bucket < TEST_BUCKETS:
        return "test"
    return "calibration" if bucket < TEST_BUCKETS + CALIBRATION_BUCKETS else "train"


def share_of(pool: str, keys: Iterable[str], split: Split) -> list[str]:
    """The keys of a small pool that belong to a split: exact shares, where ``split_of`` scatters.

    The order of ``keys`` does not matter.
    """
    ordered = sorted(keys, key=lambda key: (zlib.crc32(f"{pool}/{key}".encode()), key))
    test = round(len(ordered) * TEST_BUCKETS / BUCKETS)
    calibration = test + round(len(ordered) * CALIBRATION_BUCKETS / BUCKETS)
    cuts = {"test": (0, test), "calibration": (test, calibration), "train": (calibration, None)}
    return ordered[slice(*cuts[split])]


@cache
def rows(name: str) -> tuple[tuple[str, ...], ...]:
    """Rows of a tab-separated data file of this package."""
    text = (DATA / name).read_text(encoding="utf-8")
    return tuple(tuple(line.split("\t")) for line in text.splitlines())
