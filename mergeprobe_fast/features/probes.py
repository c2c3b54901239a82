"""Features of the first few percent of training: snapshots, their gradients, their paths."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast import engine
from mergeprobe_fast.engine.probes import ProbeGrams, probe_grams
from mergeprobe_fast.features.declare import AdapterColumn, Family, PairColumn, ratio
from mergeprobe_fast.features.subspace import FEATURES as SUBSPACE
from mergeprobe_fast.features.twins import directed
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.probe import Snapshot
    from mergeprobe_fast.recorded import Recorded

log = logging.getLogger("mergeprobe_fast")

_ROW_OVERLAP = replace(next(f for f in SUBSPACE if f.name == "row_overlap"), per_module=False)


@dataclass(frozen=True, eq=False)
class ProbeTable:
    """What the columns are made from; tables over the k adapters that have a probe.

    ``position`` maps an adapter of the zoo to its row, -1 where it has no probe.
    """

    position: np.ndarray  # (n,)
    snapshots: tuple[Snapshot, ...]  # (k,)
    grams: ProbeGrams
    row_overlap: np.ndarray  # (k, k), NaN on the diagonal
    initial: np.ndarray  # (k, modules) number of the first A, equal where the bytes are; -1: none
    euler: np.ndarray  # (k,) <G, W>, mean over the window
    visible_square: np.ndarray  # (k,) |G P_A|^2, mean over the window

    def adapters(self, values: np.ndarray) -> np.ndarray:
        """A number per snapshot as one per adapter of the zoo, NaN where it has none."""
        return np.append(np.asarray(values, np.float64), np.nan)[self.position]

    def pairs(self, table: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Entries (a, b) of a table over the snapshots, NaN where one has none."""
        i, j = self.position[a], self.position[b]
        return np.where((i >= 0) & (j >= 0), table[i, j], np.nan)


def compute(zoo: Zoo, recorded: Recorded, threads: int) -> ProbeTable:
    """Tables over the snapshots that belong to the adapters of a zoo.

    Raises:
        InputError: a snapshot of another base model or other shapes than the zoo's, a file that
            changed, a number that is not finite.
    """
    assert recorded.probes is not None
    position = np.full(len(zoo), -1)
    position[[i for i, s in enumerate(recorded.probes) if s is not None]] = np.arange(
        sum(s is not None for s in recorded.probes)
    )
    snapshots = tuple(s for s in recorded.probes if s is not None)
    Zoo([*zoo.adapters, *(s.adapter for s in snapshots)], same_base=zoo._same_base)
    probes = Zoo([s.adapter for s in snapshots], same_base=True)
    names = [m.name for m in probes.modules]
    overlap = np.full((len(snapshots),) * 2, np.nan)
    found = engine.run(probes, [_ROW_OVERLAP], threads=threads)
    overlap[found.a, found.b] = overlap[found.b, found.a] = found.columns["row_overlap"]
    euler = [sum(s.values(k).values()) for k in ("euler_a", "euler_b") for s in snapshots]
    return ProbeTable(
        position, snapshots, probe_grams(snapshots, names, threads), overlap,
        _initial(snapshots, names), np.reshape(euler, (2, -1)).mean(0),
        np.array([sum(s.values("visible_square").values()) for s in snapshots]),
    )  # fmt: skip


def _initial(snapshots: tuple[Snapshot, ...], modules: list[str]) -> np.ndarray:
    numbers: dict[tuple[str, str], int] = {}
    out = np.full((len(snapshots), len(modules)), -1)
    for i, snapshot in enumerate(snapshots):
        known = snapshot.info.initial.modules if snapshot.info.initial else {}
        for k, module in enumerate(modules):
            if module in known:
                out[i, k] = numbers.setdefault((module, known[module]), len(numbers))
    return out


def _norm(square: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(square, 0.0))


def _of(table: Callable[[ProbeGrams], np.ndarray]) -> Callable[[ProbeTable], np.ndarray]:
    """|X| of each adapter, X the matrices of a Gram table."""
    return lambda t: t.adapters(_norm(np.diag(table(t.grams))))


def _cosine(table: Callable[[ProbeGrams], np.ndarray]):
    def finish(t: ProbeTable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        gram = table(t.grams)
        size = _norm(np.diag(gram))
        return t.pairs(ratio(gram, np.outer(size, size)), a, b)

    return finish


def _norm_ratio(t: ProbeTable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = t.adapters(_norm(np.diag(t.grams.delta)))
    return ratio(np.minimum(size[a], size[b]), np.maximum(size[a], size[b]))


def _first_order(t: ProbeTable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Victim a, partner b."""
    sizes = _norm(np.diag(t.grams.gradient)), _norm(np.diag(t.grams.delta))
    return t.pairs(ratio(t.grams.first_order, np.outer(*sizes)), a, b)


def _shared_init(t: ProbeTable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal first A over modules that both have, NaN where one run does not know its first A."""
    rows = np.vstack([t.initial, np.full((1, t.initial.shape[1]), -1)])  # -1: no probe
    i, j = t.position[a], t.position[b]
    same, both = np.zeros(len(a)), np.zeros(len(a))
    for column in rows.T:
        there = (column[i] >= 0) & (column[j] >= 0)
        both += there
        same += there & (column[i] == column[j])
    return ratio(same, both)


def _info(read: Callable[[Snapshot], float | None]) -> Callable[[ProbeTable], np.ndarray]:
    def finish(t: ProbeTable) -> np.ndarray:
        found = [read(s) for s in t.snapshots]
        return t.adapters(np.array([np.nan if value is None else value for value in found]))

    return finish


def _euler_relative(t: ProbeTable) -> np.ndarray:
    size = _norm(np.diag(t.grams.delta)) * np.sqrt(t.visible_square)
    return t.adapters(ratio(t.euler, size))


def _noise_scale(t: ProbeTable) -> np.ndarray:
    steps = np.array([s.info.window for s in t.snapshots], np.float64)
    steps[steps < 2] = np.nan  # one gradient says nothing about their spread
    # The factors move within the window: what should be positive may come out below zero.
    spread = np.maximum(t.visible_square - t.grams.visible, 0.0) * steps / (steps - 1)
    signal = t.grams.visible - spread / steps
    undefined = int(np.count_nonzero(signal <= 0))
    if undefined:
        log.info("gradient noise scale of %d probes: no signal above the noise", undefined)
    return t.adapters(ratio(spread, signal))


def _before(t: ProbeTable) -> np.ndarray:
    """1 where there is a snapshot before, else NaN."""
    return np.array([np.nan if s.before is None else 1.0 for s in t.snapshots])


def _growth(t: ProbeTable) -> np.ndarray:
    square = t.grams.path
    return t.adapters(ratio(_norm(square[:, 2, 2]), _norm(square[:, 1, 1])) * _before(t))


def _straightness(t: ProbeTable) -> np.ndarray:
    one, other = np.array([-1.0, 1.0, 0.0]), np.array([0.0, -1.0, 1.0])

    def inner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.einsum("k,ikl,l->i", x, t.grams.path, y)

    size = _norm(inner(one, one)) * _norm(inner(other, other))
    return t.adapters(ratio(inner(one, other), size) * _before(t))


def _displacement(t: ProbeTable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    there = t.adapters(_before(t))
    return _cosine(lambda g: g.displacement)(t, a, b) * there[a] * there[b]


_UNIT = {"low": -1.0, "high": 1.0, "bounded": (-1.0, 1.0)}
_SHARE = {"low": 0.0, "high": 1.0, "bounded": (0.0, 1.0)}

PAIRS = (
    PairColumn(
        "probe_cosine", "Cosine of the probes",
        "Cosine of the two updates early in training. With independent first A it is damped by "
        "about rank / (d_in + rank + 1): read it together with probe_shared_init.",
        _cosine(lambda g: g.delta), null=0.0, null_text="0", source="standard", **_UNIT,
    ),
    PairColumn(
        "probe_norm_ratio", "Norm ratio of the probes",
        "Smaller over larger norm of the two updates early in training.",
        _norm_ratio, source="standard", **_SHARE,
    ),
    PairColumn(
        "probe_gradient_cosine", "Cosine of the probes' gradients",
        "Cosine of the two mean gradients, each projected onto what its own factors can change. "
        "Positive: both losses fall along the same changes of the weights.",
        _cosine(lambda g: g.gradient), null=0.0, null_text="0",
        source="LoRA-Pro; Riemannian LoRA", **_UNIT,
    ),
    *directed(
        "probe_first_order", "First-order effect of {b} on {a}, probes",
        "<T_{a}, W_{b}> / (|T_{a}| |W_{b}|): how {b}'s early update changes {a}'s loss to first "
        "order, as far as {a}'s factor gradients show. Below 0: {b} helps {a}.",
        _first_order, null=0.0, null_text="0", source="ours", **_UNIT,
    ),
    PairColumn(
        "probe_displacement_cosine", "Cosine of the probes' displacements",
        "Cosine of what the two updates moved by since the snapshot before.",
        _displacement, null=0.0, null_text="0", source="standard", **_UNIT,
    ),
    PairColumn(
        "probe_shared_init", "Shared first A",
        "Share of the modules of both whose training began with the very same A. Early cosines of "
        "pairs with and without a shared start must not be compared.",
        _shared_init, source="ours", **_SHARE,
    ),
    PairColumn(
        "probe_row_overlap", "Row overlap of the probes",
        "Row overlap of the two updates early in training: mostly whether they began with one A.",
        lambda t, a, b: t.pairs(t.row_overlap, a, b), null_text="max(rank) / dimension",
        source="projection metric on Grassmannians", **_SHARE,
    ),
)  # fmt: skip

ADAPTERS = (
    AdapterColumn(
        "probe_steps", "Probe steps", "Optimiser steps before the snapshot.",
        _info(lambda s: s.steps),
    ),
    AdapterColumn(
        "probe_fraction", "Probe fraction", "Share of the training that it stands for.",
        _info(lambda s: s.fraction),
    ),
    AdapterColumn(
        "probe_loss", "Probe loss",
        "Mean training loss over the steps since the snapshot before, nats per token.",
        _info(lambda s: s.info.loss and s.info.loss.mean),
    ),
    AdapterColumn(
        "probe_learning_rate_integral", "Learning-rate integral",
        "Sum of the learning rates of all steps before the snapshot.",
        _info(lambda s: s.info.learning_rate_integral),
    ),
    AdapterColumn(
        "probe_clip", "Clip factor",
        "Mean factor that clipping multiplied the gradients with; 1: never clipped.",
        _info(lambda s: s.info.clip and s.info.clip.mean),
    ),
    AdapterColumn(
        "probe_norm", "Probe norm", "|W|_F of the update at the snapshot.", _of(lambda g: g.delta)
    ),
    AdapterColumn(
        "probe_euler", "Gradient along the update",
        "<G, W> = <dA, A> = <dB, B>, mean over the window: the slope of the loss when the update "
        "is scaled up. Below 0: scaling it up still helps.",
        lambda t: t.adapters(t.euler), source="Euler's identity",
    ),
    AdapterColumn(
        "probe_euler_relative", "Gradient along the update, relative",
        "probe_euler over |G P_A| (root mean square over the window) and |W|.", _euler_relative,
        source="Euler's identity",
    ),
    AdapterColumn(
        "probe_gradient_norm", "Gradient norm",
        "|T|_F of the mean gradient, projected onto what the factors can change.",
        _of(lambda g: g.gradient), source="LoRA-Pro; Riemannian LoRA",
    ),
    AdapterColumn(
        "probe_noise_scale", "Gradient noise scale",
        "Batches, of one optimiser step each, whose mean gradient G P_A has as much noise as "
        "signal: tr Cov / |mean|^2, debiased. Undefined when no signal is left above the noise.",
        _noise_scale, source="B_simple (McCandlish et al. 2018)",
    ),
    AdapterColumn(
        "probe_displacement", "Displacement",
        "|W - W'|_F since the snapshot before.",
        lambda t: _of(lambda g: g.displacement)(t) * t.adapters(_before(t)),
    ),
    AdapterColumn(
        "probe_straightness", "Straightness",
        "Cosine of the last displacement and the one before it; training begins at W = 0.",
        _straightness,
    ),
    AdapterColumn(
        "probe_growth", "Growth", "|W| over that of the snapshot before.", _growth
    ),
)  # fmt: skip

FAMILY = Family(
    "probes", missing=lambda recorded: "probes" if recorded.probes is None else None,
    compute=compute, pairs=PAIRS, adapters=ADAPTERS, title="Early training", made_from="",
)  # fmt: skip
