"""Families of columns that were killed go on from what they had kept, and give the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import make_adapter

import mergeprobe_fast as mpf
from mergeprobe_fast import InputError, screening
from mergeprobe_fast.engine import angles, entries, kept, kept_sums, passes
from mergeprobe_fast.features import profiles
from mergeprobe_fast.features.declare import AdapterColumn, Family, PairColumn
from mergeprobe_fast.features.entries import entry_features
from mergeprobe_fast.recorded import NOTHING

MODULES = ["layers.0.q", "layers.0.down", "layers.1.q", "layers.2.v"]
SIZES = [(24, 20), (20, 33), (24, 20), (9, 20)]
EVERYTHING = ["all", "2601.22285", "gradience"]


@pytest.fixture
def folder(tmp_path, rng):
    """Seven adapters of ragged ranks, with a module missing, one that is zero and a copy."""
    for i in range(7):
        names = MODULES if i != 2 else MODULES[1:]
        sizes = {n: (*SIZES[MODULES.index(n)], int(rng.integers(1, 12))) for n in names}
        seed = int(rng.integers(2**32))
        make_adapter(tmp_path / "zoo" / f"a{i}", sizes, seed=seed,
                     zero_b=(MODULES[3],) if i == 4 else False)  # fmt: skip
    return tmp_path / "zoo"


def in_small_pieces(patch=setattr):
    """Blocks of two adapters, chunks of one module, and every step is kept."""
    for where, name, value in (
        (passes, "CHUNK_BYTES", 1), (entries, "BLOCK", 2), (angles, "FACTOR_BYTES", 1),
        (angles, "RESULT_BYTES", 1), (entries, "FEWEST", 128), (kept_sums, "SECONDS", 0.0),
        (kept_sums, "SHARE", np.inf), (kept_sums, "WORTH", 0.0),
    ):  # fmt: skip
        patch(where, name, value)


@pytest.fixture
def pieces(monkeypatch):
    in_small_pieces(monkeypatch.setattr)


def columns(zoo, features, keep=None, progress=None):
    found = screening.screen(zoo, features, keep=keep, progress=progress, threads=2)
    return {
        f"{kind}:{name}": np.asarray(table[name])
        for kind, table in (("pairs", found.pairs), ("adapters", found.adapters))
        for name in table if name != "path"
    }  # fmt: skip


def same(one, other):
    assert [*one] == [*other]
    for name, values in one.items():
        mine, true = other[name], values
        assert mine.dtype == true.dtype, name
        assert [*mine] == [*true] if true.dtype == object else mine.tobytes() == true.tobytes(), (
            name
        )


def killed_at(write, folder, keep, *, before):
    """A child that goes over the zoo, and is killed just before or after its ``write``-th file."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_kept_families as t
t.in_small_pieces()
replace, count = os.replace, [0]
def killing(*paths):
    count[0] += 1
    if {before} and count[0] == {write}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    if count[0] == {write}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
t.columns(t.mpf.open_zoo({str(folder)!r}), t.EVERYTHING, {str(keep)!r})
"""
    # Not from the checkout, whose folder of the package may have no compiled module.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(folder).parent
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def writes(monkeypatch):
    """Names of the files that are kept."""
    found, put = [], kept.Files.put

    def noted(self, name, *arguments):
        put(self, name, *arguments)
        found.append(name)

    monkeypatch.setattr(kept.Files, "put", noted)
    return found


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_file_it_goes_on_and_gives_the_same_bytes(
    tmp_path, folder, rng, pieces, writes, before
):
    zoo = mpf.open_zoo(folder)
    whole = columns(zoo, EVERYTHING)
    same(whole, columns(zoo, EVERYTHING, tmp_path / "keep"))
    every = list(writes)
    assert {n for n in every if n.startswith("sums-")} == {
        f"sums-{n}.safetensors" for n in
        ("entries", "angles", "channels", "crosswalk_overlaps", "crosswalk_agreements")
    }  # fmt: skip
    at = 0
    for part in range(3):  # killed again and again
        at = int(rng.integers(1, len(every) // 3))
        keep = tmp_path / f"keep{part}"
        killed_at(at, folder, keep, before=before)
        left = len(every) - at
        if part:
            killed_at(int(rng.integers(1, left // 2)), folder, keep, before=before)
        writes.clear()
        same(whole, columns(zoo, EVERYTHING, keep))
        assert len(writes) <= left + before
        assert not [p for p in keep.iterdir() if p.name.startswith((".", "sums-"))]
        writes.clear()
        same(whole, columns(zoo, EVERYTHING, keep))
        assert not writes
        kept.remove_blocks(keep)
        assert not keep.exists()


KINDS = {
    "entries": (lambda: entry_features("exact"), "engine.entry_modules.entry_pairs"),
    "entries of a sample": (lambda: entry_features(700), "engine.entry_modules.entry_pairs"),
    "angles": (lambda: "row_geodesic", "engine.angles._Block._modules"),
    "channels": (lambda: profiles.CHANNELS, "features.profiles.energies"),
    "crosswalk_overlaps": (lambda: "2601.22285", "features.crosswalk_tiles.outputs"),
    "crosswalk_agreements": (lambda: "gradience", "features.crosswalk_tiles._add"),
}


# Those that go over whole chunks keep nothing in the middle of one.
@pytest.mark.parametrize(("kind", "chunk"), [
    *((kind, 1) for kind in KINDS),
    *((kind, 1 << 20) for kind in ("entries", "angles", "crosswalk_agreements")),
])  # fmt: skip
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_added_up_is_not_added_up_again(
    tmp_path, folder, pieces, monkeypatch, kind, chunk, share
):
    monkeypatch.setattr(passes, "CHUNK_BYTES", chunk)
    zoo, feature = mpf.open_zoo(folder), KINDS[kind][0]()
    name = f"sums-{kind.split()[0]}.safetensors"
    calls, steps = [], []
    target = f"mergeprobe_fast.{KINDS[kind][1]}"
    where, attribute = target.rsplit(".", 1)
    work = getattr(_resolve(where), attribute)
    monkeypatch.setattr(target, lambda *a, **k: (calls.append(1), work(*a, **k))[1])
    put = kept.Files.put

    def stopping(self, file, made_from, tensors, told):
        put(self, file, made_from, tensors, told)
        if file == name:
            steps.append(len(calls))
            if len(steps) == stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(kept.Files, "put", stopping)
    stop = -1
    whole = columns(zoo, [feature], tmp_path / "whole")
    total, every = len(calls), list(steps)
    assert len(every) >= len(MODULES)
    stop = 1 + int(share * (len(every) - 1))
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        columns(zoo, [feature], tmp_path / "keep")
    assert name in os.listdir(tmp_path / "keep")
    calls.clear()
    steps.clear()
    told = []
    stop = -1
    same(whole, columns(zoo, [feature], tmp_path / "keep", told.append))
    assert len(calls) == total - every[int(share * (len(every) - 1))]
    chosen = screening.select([feature])
    assert sum(told) == screening.steps(zoo, chosen)


def _resolve(path):
    """A module of the package, or a class in one."""
    found = mpf
    for part in path.split(".")[1:]:
        found = getattr(found, part)
    return found


def test_other_options_other_files_and_other_columns_start_anew(
    tmp_path, folder, pieces, writes, rng
):
    zoo, keep = mpf.open_zoo(folder), tmp_path / "keep"
    first = entry_features("exact")
    columns(zoo, [first], keep)
    writes.clear()
    columns(zoo, [entry_features("exact")], keep)
    assert not writes
    for other in (
        entry_features("exact", density=0.3), entry_features(700), entry_features(700, seed=1),
        entry_features(800, seed=1),
    ):  # fmt: skip
        writes.clear()
        same(columns(zoo, [other]), columns(zoo, [other], keep))
        assert "family-entries.safetensors" in writes
    writes.clear()
    columns(zoo, [first.pairs[0], replace(first, pairs=first.pairs[:1])][1:], keep)
    assert "family-entries.safetensors" in writes
    columns(zoo, [first], keep)
    make_adapter(folder / "a3", {MODULES[0]: (*SIZES[0], 3)}, seed=int(rng.integers(2**32)))
    again = mpf.open_zoo(folder)
    writes.clear()
    same(columns(again, [first]), columns(again, [first], keep))
    assert "family-entries.safetensors" in writes


def test_sums_of_other_options_are_not_gone_on_from(tmp_path, folder, pieces, monkeypatch):
    zoo, keep = mpf.open_zoo(folder), tmp_path / "keep"
    put = kept.Files.put

    def stopping(self, file, *arguments):
        put(self, file, *arguments)
        if len(os.listdir(keep)):
            raise KeyboardInterrupt

    monkeypatch.setattr(kept.Files, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        columns(zoo, [entry_features(700)], keep)
    monkeypatch.setattr(kept.Files, "put", put)
    other = entry_features(700, seed=5)
    same(columns(zoo, [other]), columns(zoo, [other], keep))


@pytest.mark.parametrize("start", ["family-", "sums-"])
def test_half_a_file_is_computed_again(tmp_path, folder, pieces, monkeypatch, start):
    zoo, keep = mpf.open_zoo(folder), tmp_path / "keep"
    whole = columns(zoo, ["row_geodesic"])
    if start == "sums-":
        monkeypatch.setattr(kept_sums.KeptFamily, "put", lambda *a: None)
    columns(zoo, ["row_geodesic"], keep)
    (path,) = keep.glob(f"{start}*")
    path.write_bytes(path.read_bytes()[:-5])
    same(whole, columns(zoo, ["row_geodesic"], keep))


def own_family(made_from, calls):
    def compute(zoo, recorded, threads):
        calls.append(1)
        return np.arange(len(zoo), dtype=float)

    return Family(
        "my own / family", lambda recorded: None, compute,
        (PairColumn("order", "Order", "b - a.", lambda d, a, b: d[b] - d[a]),),
        (AdapterColumn("place", "Place", "Place.", lambda d: d),), made_from=made_from,
    )  # fmt: skip


def test_a_family_of_ones_own_is_kept_if_it_says_what_it_is_made_from(tmp_path, folder, pieces):
    zoo, calls, keep = mpf.open_zoo(folder), [], tmp_path / "keep"
    for made_from, expected in ((None, 2), ("1", 3), ("2", 4)):
        for _ in range(2):
            found = columns(zoo, [own_family(made_from, calls)], keep)
            assert list(found["adapters:place"]) == list(range(7))
        assert len(calls) == expected
    mpf.pair_features(zoo, own_family("2", calls), keep=keep)  # other columns
    assert len(calls) == 5


def test_what_takes_a_moment_is_not_kept(tmp_path, folder):
    columns(mpf.open_zoo(folder), EVERYTHING, tmp_path / "keep")
    assert not (tmp_path / "keep").exists()


def test_a_full_disk_is_one_clear_error_and_what_was_kept_still_counts(
    tmp_path, folder, pieces, writes, monkeypatch
):
    zoo, keep, count = mpf.open_zoo(folder), tmp_path / "keep", []
    whole = columns(zoo, EVERYTHING)
    columns(zoo, EVERYTHING, tmp_path / "other")
    every, write = len(writes), kept.write

    def full(path, *arguments):
        count.append(1)
        if len(count) > every // 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(kept, "write", full)
    with pytest.raises(InputError, match=r"keep.*safetensors: cannot be written: No space left"):
        columns(zoo, EVERYTHING, keep)
    monkeypatch.setattr(kept, "write", write)
    writes.clear()
    same(whole, columns(zoo, EVERYTHING, keep))
    assert len(writes) == every - every // 2


def test_other_files_are_refused_and_left_alone(tmp_path, folder):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "family.txt").write_text("mine")
    with pytest.raises(InputError, match=r"family\.txt: does not belong"):
        columns(mpf.open_zoo(folder), ["row_geodesic"], keep)
    assert (keep / "family.txt").read_text() == "mine"


def test_sums_are_written_every_half_minute_or_as_often_as_takes_two_percent(
    tmp_path, monkeypatch
):
    now, files = [0.0], kept.Files(tmp_path)
    took = 0.1

    def put(self, *arguments):
        now[0] += took
        wrote.append(now[0])

    monkeypatch.setattr(kept.Files, "put", put)
    monkeypatch.setattr(kept_sums.time, "monotonic", lambda: now[0])
    for took, pause in ((0.1, 30), (3.0, 150)):
        wrote: list[float] = []
        sums = kept_sums.Sums(files, "sums-x.safetensors", "it")
        for step in range(1200):
            now[0] += 1.0
            sums.reached(step, {})
        assert min(np.diff(wrote)) == pytest.approx(pause + took, abs=1.0)
        assert took * len(wrote) <= 0.02 * 1200 + took
        assert len(wrote) >= 1200 / (pause + took + 1) - 1


def test_what_was_recorded_counts(tmp_path, folder):
    zoo, run = mpf.open_zoo(folder), tmp_path / "run"
    run.mkdir()
    (run / "x").write_bytes(b"1")
    early = SimpleNamespace(path=run, before=None)
    shard = SimpleNamespace(path=Path("w"), size=1, mtime_ns=2, inode=3)

    def digest(**recorded):
        return kept.made_from(zoo, [], replace(NOTHING, **recorded), profile=False)

    def base(**changes):
        stamp = SimpleNamespace(**{**vars(shard), **changes})
        return SimpleNamespace(shards=[SimpleNamespace(stamp=stamp)])

    seen = [
        digest(), digest(probes=(early, None)), digest(probes=(None, early)),
        digest(base=base()), digest(base=base(mtime_ns=4)),
    ]  # fmt: skip
    assert digest(base=base()) == seen[3]
    (run / "x").write_bytes(b"22")
    seen.append(digest(probes=(early, None)))
    assert len(set(seen)) == len(seen)


def test_another_instruction_set_starts_anew(folder, isa):
    zoo = mpf.open_zoo(folder)
    here = kept.made_from(zoo, [], NOTHING, profile=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEPROBE_ISA", "baseline")
        assert (kept.made_from(zoo, [], NOTHING, profile=False) == here) == (isa == "baseline")
