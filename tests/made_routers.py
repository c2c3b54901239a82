"""Adapters with known singular vectors, and routers of them, for tests."""

from __future__ import annotations

import numpy as np
from adapters import make_adapter

import mergeprobe_fast as mpf
from mergeprobe_fast.io.router_file import LinearInfo, Router, RouterInfo

SIZES = {"layers.0.q_proj": (11, 9), "layers.0.down_proj": (9, 14), "layers.1.q_proj": (11, 9)}


def orthonormal(rng, rows, size):
    return np.linalg.qr(rng.standard_normal((size, rows)))[0].T


def gapped(rng, d_out, d_in, sigma=(1.0, 0.3, 0.1), first=None):
    """A (r, d_in) and B (d_out, r) of a delta with these singular values, in a random gauge.

    ``first`` is its top right singular vector, if given.
    """
    right = orthonormal(rng, len(sigma), d_in)
    if first is not None:
        right = np.linalg.qr(np.vstack([first, right[1:]]).T)[0].T
    left = orthonormal(rng, len(sigma), d_out)
    gauge = np.eye(len(sigma)) + 0.3 * rng.uniform(-1, 1, (len(sigma), len(sigma))) / len(sigma)
    return gauge @ right, (left.T * sigma) @ np.linalg.inv(gauge)


def make_gapped(folder, rng, *, sizes=SIZES, first=None, **options):
    """An adapter folder of them; ``first`` by module."""
    factors = {
        name: gapped(rng, *shape, first=(first or {}).get(name)) for name, shape in sizes.items()
    }
    return with_factors(folder, factors, **options)


def with_factors(folder, factors, **options):
    """An adapter folder of exactly these (A, B) by module."""
    sizes = {name: (len(b), a.shape[1], len(a)) for name, (a, b) in factors.items()}
    return make_adapter(folder, sizes, factors=factors, **options)


def gapped_zoo(folder, rng, names=("a", "b", "c", "d"), **options):
    made = [make_gapped(folder / name, rng, **options) for name in names]
    return mpf.open_zoo([m.path for m in made]), made


def top_right(delta):
    """By a dense SVD in float64, largest entry positive."""
    v = np.linalg.svd(delta)[2][0]
    return v * np.sign(v[np.abs(v).argmax()])


def made_router(rng, adapters=("a", "b", "c"), modules=None, *, top_k=2, temperature=0.5,
                linear=True, missing=(), rule=None):  # fmt: skip
    """(info, tensors) of random unit rows; ``missing`` (module, row) are zeros."""
    modules = modules or {"m.0": 7, "m.1": 5}
    tensors = {}
    for name, d_in in modules.items():
        rows = rng.standard_normal((len(adapters), d_in))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for module, row in missing:
            rows[row] *= module != name
        tensors[f"prototype.{name}"] = rows.astype(np.float32)
    found = None
    if linear:
        module, d_in = next(iter(modules.items()))
        domains = {f"of {name}": name for name in adapters}
        found = LinearInfo(module, d_in, tuple(adapters), domains, 0.3)
        tensors["request.weight"] = rng.standard_normal((len(adapters), d_in))
        tensors["request.bias"] = rng.standard_normal(len(adapters))
    info = RouterInfo(
        "test/base", {name: f"{i:064x}" for i, name in enumerate(adapters)}, modules, top_k,
        temperature, 1, rule or ("linear" if linear else "arrow"), found,
        {"arrow": 0.75, "linear": 1.0} if linear else {}, 40 if linear else 0, ("a note",),
    )  # fmt: skip
    return info, tensors


def router_of(info, tensors, path="router.json"):
    return Router(path, info, tensors)
