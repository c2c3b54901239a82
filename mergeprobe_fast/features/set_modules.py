"""The modules of the adapters that any set has, as canonical atoms, for statistics set by set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.features.set_declare import SetRequest
from mergeprobe_fast.merging.atoms import Atoms, atoms
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.zoo import Module, Zoo


@dataclass(frozen=True, eq=False)
class ModuleAtoms:
    """One module of all adapters that are in any set."""

    module: Module
    atoms: Atoms
    rows: dict[int, slice]  # adapter of the zoo -> its atoms; only those that have any

    def of(self, set_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The atoms of a set's members, and the place in the set of each one's owner."""
        parts = [(place, self.rows[i]) for place, i in enumerate(set_.tolist()) if i in self.rows]
        rows = [np.arange(part.start, part.stop) for _, part in parts]
        owner = [np.full(part.stop - part.start, place) for place, part in parts]
        none = [np.zeros(0, np.int64)]
        return np.concatenate(rows or none), np.concatenate(owner or none)


def used_adapters(request: SetRequest) -> np.ndarray:
    """The adapters that are in any set, ascending."""
    return np.unique(request.members[request.members >= 0])


def subzoo(request: SetRequest, adapters: np.ndarray) -> Zoo:
    """A zoo of some of the adapters, in that order."""
    return Zoo([request.zoo[int(i)] for i in adapters], same_base=True)


def module_atoms(request: SetRequest) -> Iterator[ModuleAtoms]:
    """Every module in turn; what is yielded stays valid."""
    used = used_adapters(request)
    source = ZooSource(subzoo(request, used))
    for chunk in source.chunks(request.threads):
        for m in chunk:
            found = atoms([m], request.threads, request.device)[0]
            rows = {
                int(used[i]): part
                for i, part in zip(m.adapters, found.parts, strict=True)
                if part.stop > part.start
            }
            yield ModuleAtoms(m.module, found, rows)
            if request.progress:
                request.progress(1)


def each_set(request: SetRequest, function: Callable[[int, np.ndarray], None]) -> None:
    """``function(s, members of s)`` for every set, on several threads; sets share no results."""
    sets = [row[row >= 0] for row in request.members]
    with ThreadPoolExecutor(request.threads) as pool:
        for _ in pool.map(function, range(len(sets)), sets):
            pass
