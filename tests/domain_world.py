"""Adapters and a calibration of their domains as files, and every sum on them in float64.

Outputs are measured: every update is materialised and applied to every sample.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from adapters import make_adapter
from calibrations import make_calibration
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast import engine
from mergeprobe_fast.features.disturbance import FEATURES
from mergeprobe_fast.recorded import Recorded

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.self_attn.v_proj": (9, 20),
    "model.layers.0.mlp.down_proj": (20, 31),
    "model.layers.1.self_attn.q_proj": (24, 20),
}
NAMES = list(MODULES)
SHARED = {NAMES[1]: NAMES[0]}
DOMAINS = {"math": 17, "code": 9, "law": 1}
ADAPTERS = ("math-a", "code-a", "math-b", "law-a", "code-zero", "law-b", "math-c")
BY_NAME = {f.name: f for f in FEATURES}


class World:
    """Adapters and a calibration as files, with everything in float64 beside them."""

    def __init__(self, folder, rng, scale=1.0, adapters=ADAPTERS, domains=None, **options):
        domains = domains or DOMAINS
        samples = {
            (d, m): scale * (rng.standard_normal((t, MODULES[m][1])) + rng.standard_normal())
            for d, t in domains.items() for m in NAMES if SHARED.get(m, m) == m
        }  # fmt: skip
        self.rng = rng
        self.made = {}
        for i, name in enumerate(adapters):
            names = [n for k, n in enumerate(NAMES) if (i + k) % 4 or i % 3 == 0]
            sizes = {n: (*MODULES[n], 1 + (i + k) % 5) for k, n in enumerate(names)}
            self.made[name] = make_adapter(
                folder / "zoo" / name, sizes, seed=int(rng.integers(1 << 30)),
                zero_b="zero" in name, magnitude=1 + i % 3, dtype=("F32", "BF16", "F16")[i % 3],
            )
        self.calibration = make_calibration(
            folder / "calibration", MODULES, domains, rng, shared=SHARED, samples=samples,
            gradients=True, **options,
        )
        self.zoo = mpf.open_zoo(folder / "zoo")
        opened = mpf.open_calibration(self.calibration.path)
        self.names = list(self.zoo.names)
        self.domains = tuple(n.split("-")[0] for n in self.names)
        self.recorded = Recorded(opened, self.domains)

    def rewrite(self, name, factors):
        """Other factors (A, B) of an adapter, in float32."""
        path = self.made[name].path
        modules = {n: (*MODULES[n], len(a)) for n, (a, _) in factors.items()}
        self.made[name] = make_adapter(path, modules, factors=factors)
        self.zoo = mpf.open_zoo(path.parent)

    def columns(self, features=FEATURES, **options):
        """What the engine finds."""
        return engine.run(self.zoo, features, recorded=self.recorded, **options).columns

    def inputs(self, domain, module):
        return self.calibration.inputs[domain, SHARED.get(module, module)]

    def delta(self, name, module):
        made = self.made[name].modules
        return made[module].delta if module in made else np.zeros(MODULES[module])

    def terms(self, one, two, domain, module):
        """Every sum of a module, from its definition: on the domain, of two adapters."""
        c = self.calibration
        w, v = self.delta(one, module), self.delta(two, module)
        x, y = self.inputs(domain, module), c.gradients[domain, module]
        dot = float(((x @ w.T) * (x @ v.T)).sum(1).mean())
        mean = x.mean(0)
        fisher = np.outer((y**2).mean(0), (x**2).mean(0))
        return {
            "raw": dot, "relative": dot / c.output_moments[domain, module].sum(),
            "mean": float((w @ mean) @ (v @ mean)),
            "kfac": float(np.trace(w.T @ (y.T @ y / len(y)) @ v @ (x.T @ x / len(x)))),
            "fisher": float((fisher * w * v).sum()),
            "hsic": unbiased_hsic(x @ w.T, x @ v.T),
        }  # fmt: skip

    def total(self, one, two, domain, modules):
        parts = [self.terms(one, two, domain, m) for m in modules]
        return {k: sum(p[k] for p in parts) for k in parts[0]}

    def sizes(self, name, domain, modules):
        """What each sum of an adapter with itself would be if nothing cancelled: |W|^2 tr C ...

        Float32 products are off by parts of these. Where outputs are smaller (one sample that lies
        across W), they are off by as much more of themselves.
        """
        c = self.calibration
        out = dict.fromkeys(("raw", "relative", "mean", "kfac", "fisher", "hsic"), 0.0)
        for m in modules:
            w, x, y = self.delta(name, m), self.inputs(domain, m), c.gradients[domain, m]
            raw = (w**2).sum() * (x**2).sum(1).mean()
            out["raw"] += raw
            out["relative"] += raw / c.output_moments[domain, m].sum()
            out["mean"] += (w**2).sum() * (x.mean(0) ** 2).sum()
            out["kfac"] += raw * (y**2).sum(1).mean()
            out["fisher"] += self.terms(name, name, domain, m)["fisher"]
            out["hsic"] += self.biased(name, domain, [m])
        return out

    def expected(self, a, b, modules):
        """Every feature of a pair, summed over modules; and what each loses to cancellation."""
        if not all(any(self.delta(x, m).any() for m in modules) for x in (a, b)):
            return dict.fromkeys(BY_NAME, math.nan), dict.fromkeys(BY_NAME, 1.0)
        out, loss = {}, {}
        for victim, partner, owner, other in (("a", "b", a, b), ("b", "a", b, a)):
            domain = owner.split("-")[0]
            dot, own, far = (
                self.total(*x, domain, modules)
                for x in ((owner, other), (owner, owner), (other, other))
            )
            whole = [self.sizes(x, domain, modules) for x in (owner, other)]
            lost = {
                k: sum(root(w[k], e[k]) for w, e in zip(whole, (own, far), strict=True))
                for k in own
            }
            both = f"{victim}_by_{partner}"
            for name, kind in (("", "relative"), ("_raw", "raw")):
                out[f"cross_to_self{name}_{both}"] = root(far[kind], own[kind])
                loss[f"cross_to_self{name}_{both}"] = lost[kind]
            for name, kind in (("kfac", "kfac"), ("rank1_fisher", "fisher")):
                out[f"{name}_cross_to_self_base_{both}"] = root(far[kind], own[kind])
                loss[f"{name}_cross_to_self_base_{both}"] = lost[kind]
            count = sum(m in self.made[other].modules for m in modules)
            out[f"disturbance_{both}"] = math.sqrt(far["relative"] / count)
            loss[f"disturbance_{both}"] = lost["relative"]
            for name, kind in (
                ("activation_cosine", "raw"), ("drift_cka", "hsic"), ("kfac_cosine_base", "kfac"),
                ("rank1_fisher_cosine_base", "fisher"), ("mean_activation_cosine", "mean"),
            ):  # fmt: skip
                size = own[kind] * far[kind]
                out[f"{name}_{victim}"] = dot[kind] / math.sqrt(size) if size > 0 else math.nan
                loss[f"{name}_{victim}"] = lost[kind]
            # Of fourth order: what products lose counts twice, and the bias taken out of them.
            loss[f"drift_cka_{victim}"] *= lost["hsic"] + lost["raw"]
        return out, loss

    def biased(self, name, domain, modules):
        """Sum over modules of ||Y Y^T||^2 / (T (T - 3)), Y the centred outputs."""
        out = 0.0
        for m in modules:
            y = self.inputs(domain, m) @ self.delta(name, m).T
            y = y - y.mean(0)
            out += ((y @ y.T) ** 2).sum() / max(len(y) * (len(y) - 3), 1)
        return out

    def check(self, table):
        """All columns of all pairs; returns how many values were finite."""
        finite = 0
        for row, (a, b) in enumerate(itertools.combinations(self.names, 2)):
            want, loss = self.expected(a, b, NAMES)
            for name in table:
                if "." not in name:
                    finite += self.close(name, table[name][row], want[name], loss[name])
        return finite

    def close(self, name, got, want, loss):
        """Fails unless ``got`` is ``want`` within the bound; whether it is a number."""
        allowed = bound("on domains") * loss
        if "cross_to_self" in name or "disturbance" in name:
            allowed *= abs(want)
        assert math.isnan(got) == math.isnan(want), (name, got, want)
        assert math.isnan(want) or abs(got - want) <= allowed, (name, got, want)
        return not math.isnan(want)


def root(top, bottom):
    return math.sqrt(top / bottom) if bottom > 0 else math.nan


def unbiased_hsic(y, z):
    """Song et al. 2012, equation 5, on linear kernels; NaN below 4 samples."""
    t = len(y)
    if t < 4:
        return math.nan
    k, l = y @ y.T, z @ z.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(t)
    inner = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((t - 1) * (t - 2))
    return float(inner - 2 / (t - 2) * (one @ k @ l @ one)) / (t * (t - 3))
