"""How far a merged adapter's outputs are from those of each adapter on the adapter's own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.engine.samples import require
from mergeprobe_fast.merging.activation import LARGE, Recent, inputs
from mergeprobe_fast.merging.algebra import Rows, dot, gram
from mergeprobe_fast.merging.methods import MergedModule
from mergeprobe_fast.merging.source import ModuleFactors, Source, each_module

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

# A difference of energies below this share of its terms is formed from the outputs themselves.
_CANCELLED = 1e-8
COLUMNS = ("energy", "error", "full", "average")


@dataclass(frozen=True, eq=False)
class OutputErrors:
    """Mean squared outputs per module and adapter, over the samples of the adapter's own domain.

    With W_i the adapter's delta (zero where it lacks the module) and M the result, arrays are
    (modules, adapters), float64, in squared units of the module's output:
    ``energy`` E ||W_i x||^2, ``error`` E ||(M - W_i) x||^2, ``average`` the same for the plain
    average 1/N, ``full`` for the result before its rank was cut (None where the method has no
    such thing). ``missing`` names the modules that the calibration did not record.
    """

    adapters: tuple[str, ...]
    domains: tuple[str, ...]
    modules: tuple[str, ...]
    energy: np.ndarray
    error: np.ndarray
    average: np.ndarray
    full: np.ndarray | None
    missing: tuple[str, ...]

    def relative(self, column: str = "error") -> np.ndarray:
        """Per adapter: summed over modules, relative to its own energy (NaN if that is zero)."""
        values = getattr(self, column)
        return _ratio(values.sum(axis=0), self.energy.sum(axis=0))

    def report(self) -> dict[str, Any]:
        """Plain JSON: totals over modules per adapter; per module a list over the adapters.

        ``energy_share`` is how much of an adapter's whole output energy the module has. A ratio
        to an energy of zero is null.
        """
        shown = [c for c in COLUMNS[1:] if getattr(self, c) is not None]
        totals = {c: self.relative(c) for c in shown}
        rows = {}
        for k, name in enumerate(self.modules):
            error = _ratio(self.error[k], self.energy[k])
            rows[name] = {
                "error_relative": [_plain(v) for v in error],
                "energy_share": [_plain(v) for v in _ratio(self.energy[k], self.energy.sum(0))],
            }
        return {
            "unit": "E ||(M - W_i) x||^2 / E ||W_i x||^2, x the calibration's samples of the "
            "domain of adapter i, M the float32 result",
            "adapters": [
                {
                    "name": name,
                    "domain": self.domains[i],
                    **{f"{c}_relative": _plain(totals[c][i]) for c in shown},
                }
                for i, name in enumerate(self.adapters)
            ],
            "modules": rows,
            "missing": list(self.missing),
        }


def output_errors(
    source: Source,
    modules: Sequence[MergedModule],
    calibration: Calibration,
    domains: Sequence[str],
    threads: int,
    device: Any = None,
) -> OutputErrors:
    """Output errors of any merge, from the factors and the samples: one more pass over both.

    Args:
        source: what was merged.
        modules: the result; a module it does not have counts as zero.
        calibration: its samples; ``domains`` says which are whose, one name per adapter.
        threads: modules worked on at a time.
        device: where products are made, all in float64 there; two modules at a time then.

    Methods that know the numbers already have them in ``details["outputs"]`` (a list over the
    source's adapters for each name in ``COLUMNS``), and then nothing is read. Sums are float64
    (outputs of large modules float32, which is seen below 1e-11 of the energy); where an error is
    below 1e-8 of its terms it is formed anew without cancellation.

    Raises:
        InputError: a module recorded in another shape, a file that changed.
    """
    names = {m.name for m in source.modules if m.name in calibration.modules}
    require(calibration, [m for m in source.modules if m.name in names])
    result = {m.module.name: m for m in modules}
    known = {
        name: result[name].details["outputs"] for name in names
        if name in result and "outputs" in result[name].details
    }  # fmt: skip
    if len(known) < len(names):
        threads = threads if device is None else min(threads, 2)
        recent = Recent(threads)
        recorded = ([m for m in c if m.module.name in names] for c in source.chunks(threads))

        def row(m: ModuleFactors) -> tuple[str, Mapping[str, list[float]]]:
            merged = result.get(m.module.name)
            return m.module.name, _of_module(m, merged, calibration, domains, recent, device)

        known = dict(
            each_module(recorded, row, threads, lambda m: calibration.input_key(m.module.name))
        )
    covered = tuple(m.name for m in source.modules if m.name in names)
    columns = {
        c: np.array([known[name][c] for name in covered]).reshape(len(covered), len(domains))
        for c in COLUMNS if all(c in known[name] for name in covered)
    }  # fmt: skip
    return OutputErrors(
        tuple(source.names), tuple(domains), covered, columns["energy"], columns["error"],
        columns["average"], columns.get("full"),
        tuple(m.name for m in source.modules if m.name not in names),
    )  # fmt: skip


def _of_module(
    m: ModuleFactors, merged: MergedModule | None, calibration: Calibration,
    domains: Sequence[str], recent: Recent, device: Any,
) -> Mapping[str, list[float]]:  # fmt: skip
    """One row of the table: ``v^T q v`` with q the Gram of outputs of the result and each W_j."""
    n = len(domains)
    b, a, blocks = stack(m, merged)
    narrow_a = a.astype(np.float32)
    outer = gram(b.T, device)
    mean = np.concatenate([[0.0], np.full(len(m), 1.0 / n)])
    result = np.zeros(len(mean))
    result[0] = merged is not None
    table = {c: [0.0] * n for c in ("energy", "error", "average")}
    samples = recent.get(
        calibration.input_key(m.module.name),
        lambda: {g: Rows(inputs(calibration, g, m.module), device) for g in dict.fromkeys(domains)},
    )
    for g, x in samples.items():
        seen = x.seen(narrow_a if x.x.size * n > LARGE and device is None else a)
        at = seen.astype(np.float64, copy=False)
        products = outer * gram(at, device)
        q = np.add.reduceat(np.add.reduceat(products, blocks[:-1], 0), blocks[:-1], 1)
        for i in (i for i in range(n) if domains[i] == g):
            own = np.concatenate([[0.0], m.adapters == i])
            for c, v in zip(table, (own, result - own, mean - own), strict=True):
                table[c][i] = _energy(v, q, b, a, blocks, x, device)
    return table


def stack(
    m: ModuleFactors, merged: MergedModule | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[B_M, B_1, ...], [A_M; s_1 A_1; ...] in float64, and where each begins."""
    wide = m.wide()
    d_out, d_in = m.module.d_out, m.module.d_in
    first = (np.zeros((d_out, 1)), np.zeros((1, d_in)))
    if merged is not None:
        first = (merged.b.astype(np.float64), merged.a.astype(np.float64))
    b = np.concatenate([first[0], *(b for b, _, _ in wide)], axis=1)
    a = np.concatenate([first[1], *(a * s for _, a, s in wide)])
    return b, a, np.cumsum([0, first[1].shape[0], *m.ranks])


def _energy(
    v: np.ndarray, q: np.ndarray, b: np.ndarray, a: np.ndarray, blocks: np.ndarray, x: Rows,
    device: Any,
) -> float:  # fmt: skip
    """``sum_t ||sum_j v_j W_j x_t||^2 / T``."""
    energy, size = float(v @ q @ v), float(np.square(v) @ np.diag(q))
    if energy < _CANCELLED * size:
        coefficients = np.repeat(v, np.diff(blocks))[:, None]
        energy = float(np.square(dot(b, x.seen(coefficients * a), device)).sum())
    return energy / len(x)


def _ratio(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(values, of, out=np.full(of.shape, np.nan), where=of > 0)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
