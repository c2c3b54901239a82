"""Entries of modules whose factors of all adapters are too many for the memory."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import make_adapter

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError
from mergeprobe_fast.engine import entries, passes
from mergeprobe_fast.engine.chunks import told_of_chunks

SIZES = {"m.0.a": (40, 30), "m.1.a": (33, 50), "m.2.a": (20, 20), "m.3.b": (64, 48)}


@pytest.fixture
def zoo(tmp_path, rng):
    """Nine adapters of ragged ranks, with modules missing or zero, and a copy."""
    for i in range(9):
        names = [n for k, n in enumerate(SIZES) if (i + k) % 5 or i == 0]
        sizes = {n: (*SIZES[n], int(rng.integers(1, 9))) for n in names}
        make_adapter(tmp_path / f"a{i}", sizes, seed=int(rng.integers(2**32)), dtype="BF16",
                     zero_b=(names[0],) if i == 4 else False)  # fmt: skip
    return mpf.open_zoo(tmp_path)


def arrays(sums):
    return {**vars(sums.adapters), **vars(sums.pairs)}


def held(zoo):
    """The most bytes of factors in memory at a time, as a plan says: as read, two at a time and
    what is held, and packed."""
    work = entries._Work(zoo, entries.Looking(None), 1)
    most = 0
    for read in work._plan():
        first = read.chunk.first if read.module is None else read.module
        last = read.chunk.last if read.module is None else read.module + 1
        for k in range(first, last):
            raw, packed = work._bytes(k)
            side = max(map(len, work._blocks[k]))
            if read.module is None:
                most = max(most, 2 * read.chunk.raw_bytes + 2 * side * packed)
            else:
                most = max(most, side * (3 * raw + 2 * packed))
    return most


@pytest.mark.parametrize("looking", [entries.Looking(None), entries.Looking(2000, seed=3)])
@pytest.mark.parametrize("size", [1, 20_000])
def test_blocks_of_adapters_change_no_bit(zoo, isa, monkeypatch, looking, size):
    monkeypatch.setattr(entries, "FEWEST", 128)
    want = arrays(entries.entry_sums(zoo, looking))
    monkeypatch.setattr(passes, "CHUNK_BYTES", 1)
    monkeypatch.setattr(entries, "FACTOR_BYTES", size)
    plan = entries._Work(zoo, looking, 1)._plan()
    assert size > 1 or any(read.held is not None for read in plan)
    told = []
    with told_of_chunks(told.append):
        found = arrays(entries.entry_sums(zoo, looking, threads=2))
    assert sum(told) == len(zoo.modules)
    for name, values in want.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_memory_follows_from_the_constant_and_not_from_how_many_there_are(tmp_path, monkeypatch):
    for i in range(30):
        sizes = {name: (*size, 8) for name, size in SIZES.items()}
        make_adapter(tmp_path / f"a{i:02d}", sizes, seed=i, dtype="BF16")
    zoo = mpf.open_zoo(tmp_path)
    monkeypatch.setattr(passes, "CHUNK_BYTES", 1)
    assert held(zoo) > 300_000
    for size in (60_000, 120_000, 240_000):
        monkeypatch.setattr(entries, "FACTOR_BYTES", size)
        assert size / 2 < held(zoo) <= size


def test_what_is_not_finite_is_named_in_blocks_too(zoo, tmp_path, monkeypatch, rng):
    monkeypatch.setattr(passes, "CHUNK_BYTES", 1)
    monkeypatch.setattr(entries, "FACTOR_BYTES", 1)
    a, b = rng.standard_normal((2, 30)), rng.standard_normal((40, 2))
    for value, reason in ((np.nan, "holds NaN"), (1e30, "overflow float32")):
        a[1, 3], b[2, 1] = value, 1e30
        make_adapter(tmp_path / "a6", {"m.0.a": (40, 30, 2)}, factors={"m.0.a": (a, b)})
        with pytest.raises(InputError, match=reason) as caught:
            entries.entry_sums(mpf.open_zoo(tmp_path), entries.Looking(None))
        assert "m.0.a" in str(caught.value) and "a6" in str(caught.value)
