"""The columns of families: computed, or taken from where an earlier call kept them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine import PassResult
from mergeprobe_fast.engine.chunks import told_of_chunks
from mergeprobe_fast.engine.kept import Files, digest, made_from
from mergeprobe_fast.engine.kept_sums import KeptFamily, keeping_sums
from mergeprobe_fast.features import Family, Selection
from mergeprobe_fast.features.declare import AdapterColumn, PairColumn, Spectra
from mergeprobe_fast.ops.device import computing_on
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo


class Values(NamedTuple):
    """Columns by name: of every pair of a pass, as ``finish`` gives them, and of every adapter."""

    pairs: dict[str, np.ndarray]
    adapters: dict[str, np.ndarray]


def family_values(
    zoo: Zoo,
    chosen: Selection,
    recorded: Recorded,
    result: PassResult,
    *,
    of_pairs: bool,
    of_adapters: bool,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    keep: str | os.PathLike[str] | None = None,
    device: Any = None,
) -> Values:
    """The columns of all chosen families, of pairs, of adapters, or of both.

    ``progress`` gets the modules of the zoo once for every family that goes over it. ``keep``: a
    folder for the columns of families that take long (those with ``made_from``), and for what the
    slowest have added up so far. A family of which no column is wanted is not computed. ``device``:
    from :func:`mergeprobe_fast.ops.open_device`; families find it by ``current_device``.

    Raises:
        InputError: as the families do; other files in ``keep``, or no room there.
    """
    count, values = _env.threads_or_default(threads), Values({}, {})
    files = None
    if keep is not None and any(f.made_from is not None for f in chosen.families):
        files, seen = Files(keep), made_from(zoo, [], recorded, profile=False)
    for name in dict.fromkeys(f.name for f in chosen.families):
        same = [f for f in chosen.families if f.name == name]  # others of its columns
        family = same[0]
        pairs = [c for f in same for c in chosen.columns if c in f.pairs] if of_pairs else []
        own = [c for f in same for c in f.adapters if chosen.takes(c)] if of_adapters else []
        kept = KeptFamily(None, "", "")
        if files is not None and family.made_from is not None:
            kept = KeptFamily(files, name, _made_from(seen, family, pairs, own, result, device))
        with _told(zoo, progress) if family.compute is not None else nullcontext():
            found = kept.get() if pairs or own else {}
            if found is None:
                started = time.monotonic()
                with _env.one_blas_thread(), keeping_sums(kept.sums), computing_on(device):
                    data = _compute(family, zoo, recorded, result, count)
                found = _finished(data, pairs, own, result)
                kept.put(found, time.monotonic() - started)
        values.pairs.update((c.name, found[f"pair:{c.name}"]) for c in pairs)
        values.adapters.update((c.name, found[f"adapter:{c.name}"]) for c in own)
    return values


def _made_from(
    seen: str, family: Family, pairs: list[PairColumn], own: list[AdapterColumn],
    result: PassResult, device: Any,
) -> str:  # fmt: skip
    columns = [(c.name, c.definition) for c in (*pairs, *own)]
    spectra = None
    if family.from_spectra is not None:  # which another device rounds otherwise
        spectra = hashlib.sha256(result.sigma.tobytes() + result.rank.tobytes()).hexdigest()
    where = () if device is None else (device.label,)
    return digest(seen, family.name, family.made_from, len(pairs), columns, spectra, *where)


def _compute(
    family: Family, zoo: Zoo, recorded: Recorded, result: PassResult, threads: int
) -> Any:
    if family.compute is not None:
        return family.compute(zoo, recorded, threads)
    assert family.from_spectra is not None
    sigma = np.where(result.rank[:, None] > 0, result.sigma, 0.0)
    return family.from_spectra(Spectra(zoo, recorded, sigma, result.rank))


def _finished(
    data: Any, pairs: list[PairColumn], own: list[AdapterColumn], result: PassResult
) -> dict[str, np.ndarray]:
    found = {
        f"pair:{c.name}": np.asarray(c.finish(data, result.a, result.b), np.float64) for c in pairs
    }
    return found | {f"adapter:{c.name}": np.asarray(c.finish(data)) for c in own}


class _told:
    """While the block runs, ``progress`` hears of chunks; in the end, of every module once."""

    def __init__(self, zoo: Zoo, progress: Callable[[int], None] | None) -> None:
        self._left, self._progress = len(zoo.modules), progress
        self._chunks = told_of_chunks(self._advance)

    def _advance(self, modules: int) -> None:
        step = min(modules, self._left)
        self._left -= step
        if self._progress and step:
            self._progress(step)

    def __enter__(self) -> None:
        self._chunks.__enter__()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._chunks.__exit__(kind, *error)
        if kind is None:
            self._advance(self._left)
