"""A small zoo on disk with a calibration, and the dense truth about sets of its adapters."""

from __future__ import annotations

import numpy as np
from adapters import make_adapter
from calibrations import make_calibration

from mergeprobe_fast.zoo import open_zoo

MODULES = {"layers.0.q": (7, 12, 3), "layers.0.v": (5, 12, 3), "layers.1.q": (12, 7, 3)}
SIZES = {name: sizes[:2] for name, sizes in MODULES.items()}
DOMAINS = {"math": 30, "code": 23, "law": 30}
NAMES = ["math-a", "math-b", "code-a", "code-b", "law-a"]


class Made:
    """Five adapters, one of which lacks a module, and the dense truth about them."""

    def __init__(self, folder, rng, *, version=2, change=None):
        self.folder = folder
        self.rng = rng
        seeds = rng.integers(1 << 30, size=len(NAMES))
        recipes = [{"modules": MODULES, "rank": 2 + i % 3} for i in range(len(NAMES))]
        recipes[1]["modules"] = {n: MODULES[n] for n in list(MODULES)[:2]}
        recipes[2]["magnitude"] = 3.0
        for recipe, more in zip(recipes, change or [{}] * len(NAMES), strict=True):
            recipe.update(more)
        self.made = [
            make_adapter(folder / "zoo" / name, seed=int(seed), **recipe)
            for name, seed, recipe in zip(NAMES, seeds, recipes, strict=True)
        ]
        self.calibration = make_calibration(folder / "cal", SIZES, DOMAINS, rng, version=version,
                                            samples=self._samples())  # fmt: skip
        self.zoo = open_zoo(folder / "zoo")
        order = [NAMES.index(name) for name in self.zoo.names]
        self.made = [self.made[i] for i in order]
        self.domains = [name.split("-")[0] for name in self.zoo.names]

    def _samples(self):
        made = {}
        for domain, count in DOMAINS.items():
            for name, (_, d_in) in SIZES.items():
                mixing = self.rng.standard_normal((d_in, d_in)) / d_in**0.5
                made[domain, name] = self.rng.standard_normal((count, d_in)) @ mixing
        return made

    def delta(self, i, name):
        m = self.made[i].modules.get(name)
        return np.zeros(SIZES[name]) if m is None else m.delta

    def count(self, domain, name, raw=False):
        if raw or not self.calibration.output_moments:
            return 1.0
        return 1.0 / self.calibration.output_moments[domain, name].sum()

    def outputs(self, i, change, raw=False):
        """change(name) x on the inputs of adapter i's domain, flat: its energy is its square."""
        g = self.domains[i]
        parts = []
        for name in SIZES:
            x = self.calibration.inputs[g, name]
            scale = np.sqrt(self.count(g, name, raw) / len(x))
            parts.append((x @ change(name).T).ravel() * scale)
        return np.concatenate(parts)

    def error(self, i, merged, raw=False):
        off = self.outputs(i, lambda n: merged(n) - self.delta(i, n), raw)
        own = self.outputs(i, lambda n: self.delta(i, n), raw)
        return (off @ off) / (own @ own)

    def whole(self, i):
        return np.concatenate([self.delta(i, n).ravel() for n in SIZES])

    def atoms(self, members, name):
        """(owner, delta) of every singular triple, by numpy's SVD."""
        found = []
        for place, i in enumerate(members):
            u, s, vt = np.linalg.svd(self.delta(i, name), full_matrices=False)
            keep = s > 1e-6 * max(s[0], 1e-300)
            found += [(place, s[a] * np.outer(u[:, a], vt[a])) for a in np.flatnonzero(keep)]
        return found


SETS = [["math-a", "code-a", "law-a"], ["math-b", "code-b"], ["law-a"], [0, 1, 2, 3, 4],
        ["math-b", "math-a"]]  # fmt: skip
