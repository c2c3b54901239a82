"""How large an update is beside the base model's weights that it is added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.engine.base_norms import norms
from mergeprobe_fast.features.declare import AdapterColumn, Family, Spectra, ratio
from mergeprobe_fast.recorded import Recorded


@dataclass(frozen=True, eq=False)
class BesideBase:
    """Norms (N, modules) of N deltas and of the base's weights, NaN where there is none."""

    norm: np.ndarray
    spectral: np.ndarray
    base_norm: np.ndarray
    base_spectral: np.ndarray


def _compute(found: Spectra) -> BesideBase:
    from mergeprobe_fast.merging.targets import find_targets  # merging takes as long as all else

    zoo, base = found.zoo, found.recorded.base
    assert base is not None
    targets = find_targets(zoo, base)
    of_base = np.array([norms(targets[m.name].tensor) for m in zoo.modules]).reshape(-1, 2)
    e = zoo.table.entries
    out = np.full((4, len(zoo), len(zoo.modules)), np.nan)
    at = e["adapter"], e["module"]
    out[0][at] = np.sqrt(np.square(found.sigma).sum(1))
    out[1][at] = found.sigma[:, 0] if found.sigma.shape[1] else 0.0
    out[2][at], out[3][at] = of_base[e["module"]].T
    return BesideBase(*out)


def _lacks_base(recorded: Recorded) -> str | None:
    return "the base model's weights" if recorded.base is None else None


def _over_modules(kind: str, reduce: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def finish(data: BesideBase) -> np.ndarray:
        top, bottom = _sides(data, kind)
        shares = ratio(top, bottom)
        out = np.full(len(shares), np.nan)
        some = ~np.isnan(shares).all(1)
        out[some] = reduce(shares[some], axis=1)
        return out

    return finish


def _sides(data: BesideBase, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "norm":
        return data.norm, data.base_norm
    return data.spectral, data.base_spectral


def _whole_norm(data: BesideBase) -> np.ndarray:
    return np.sqrt(ratio(np.nansum(data.norm**2, 1), np.nansum(data.base_norm**2, 1)))


def _whole_spectral(data: BesideBase) -> np.ndarray:
    known = np.nan_to_num
    return ratio(known(data.spectral).max(1), known(data.base_spectral).max(1))


def _columns(kind: str, word: str, finish: Callable, source: str) -> tuple[AdapterColumn, ...]:
    name = f"base_{kind}_ratio"
    return (
        AdapterColumn(
            name, f"{word} over the base's",
            f"{word} of the update over that of the base model's weights, of all modules that the "
            "adapter changes together.", finish, source, 0.0,
        ),
        AdapterColumn(
            f"{name}.mean", f"{word} over the base's, mean", f"Mean of {name} over modules.",
            _over_modules(kind, np.nanmean), source, 0.0,
        ),
        AdapterColumn(
            f"{name}.max", f"{word} over the base's, largest", f"Largest {name} of a module.",
            _over_modules(kind, np.nanmax), source, 0.0,
        ),
    )  # fmt: skip


FAMILY = Family(
    "base", _lacks_base, from_spectra=_compute, title="Beside the base's weights",
    made_from="",
    cost="up to 200 d_out d_in per module, with all of the base's weights read once",
    adapters=(
        *_columns("norm", "Frobenius norm", _whole_norm, "gradience (udr_f)"),
        *_columns("spectral", "Spectral norm", _whole_spectral,
                  "update dominance ratio, gradience (udr)"),
    ),
)  # fmt: skip
