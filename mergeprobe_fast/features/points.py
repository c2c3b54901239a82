"""Features from points: what each update does to the loss of trained models, on their own data.

At a point, phi_j[s] is the derivative of text s's loss (the mean over its label tokens, in nats)
along W_j, exact over the whole network. With g_j its mean over texts, labels the data's, and F_ij
the mean of tokens_s phi_i[s] phi_j[s], labels drawn from the model there (the Fisher of the mean
loss), the loss after adding W_j is ``g_j + F_jj / 2`` higher, to second order. Points are never
mixed: "trained" is the base with the victim's own update, "base" the base itself, both on texts of
the victim's domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.declare import AdapterColumn, Family, ratio
from mergeprobe_fast.features.twins import directed, sided
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.points import Points
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo


@dataclass(frozen=True, eq=False)
class Effects:
    """What partners do at one kind of point, (victims N, partners N), NaN where unknown.

    ``first`` is g_j, ``fisher`` F_jj and ``cross`` F_aj, with a the victim.
    """

    first: np.ndarray
    fisher: np.ndarray
    cross: np.ndarray

    @classmethod
    def unknown(cls, count: int) -> Effects:
        return cls(*(np.full((count, count), np.nan) for _ in range(3)))

    def fill(
        self, points: Points, key: str, victim: int, known: np.ndarray, at: np.ndarray
    ) -> None:
        """The row of a victim: columns ``at`` of the point are the adapters ``known``."""
        phi = points.phi(key, "model")[:, at]
        tokens = points.losses(key)[2][:, None]
        own = phi[:, known == victim]
        self.first[victim, known] = points.phi(key, "data")[:, at].mean(axis=0)
        self.fisher[victim, known] = (tokens * phi**2).mean(axis=0)
        self.cross[victim, known] = (tokens * phi * own).mean(axis=0)


@dataclass(frozen=True, eq=False)
class PointData:
    """``gain`` and the losses are (N,), of each adapter on its own domain, in nats per token."""

    trained: Effects
    base: Effects
    base_loss: np.ndarray
    trained_loss: np.ndarray
    gain_error: np.ndarray
    top_module: np.ndarray  # (N, N) share of the module-wise curvature, at trained points

    @property
    def gain(self) -> np.ndarray:
        return self.base_loss - self.trained_loss


def _compute(zoo: Zoo, recorded: Recorded, threads: int) -> PointData:
    points, count = recorded.points, len(zoo)
    known, at = columns_of(zoo, points, np.arange(count))
    data = PointData(
        Effects.unknown(count), Effects.unknown(count),
        *(np.full(count, np.nan) for _ in range(3)), np.full((count, count), np.nan),
    )  # fmt: skip
    for i in known:
        key = trained_point(zoo, recorded, int(i))
        if key is None:
            continue
        base, here, _ = points.losses(key)
        data.base_loss[i], data.trained_loss[i] = base.mean(), here.mean()
        if len(base) > 1:
            data.gain_error[i] = (base - here).std(ddof=1) / np.sqrt(len(base))
        data.trained.fill(points, key, i, known, at)
        parts = points.curvature(key)[:, at]
        data.top_module[i, known] = ratio(parts.max(axis=0), parts.sum(axis=0))
        base_key = f"base:{recorded.domains[i]}"
        if base_key in points.points:
            data.base.fill(points, base_key, i, known, at)
    return data


def columns_of(zoo: Zoo, points: Points, adapters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of ``adapters`` of a zoo that points know, and the columns of phi that are theirs.

    InputError for another adapter of the same name.
    """
    column = {name: j for j, name in enumerate(points.adapters)}
    known = [int(i) for i in adapters if zoo.names[i] in column]
    for i in known:
        if fingerprint(zoo[i]) != points.fingerprints[zoo.names[i]]:
            reason = "is not the adapter of that name whose points the calibration has: calibrate"
            raise InputError(f"{reason} anew", path=zoo[i].path, key=zoo.names[i])
    return np.array(known, np.int64), np.array([column[zoo.names[i]] for i in known], np.int64)


def trained_point(zoo: Zoo, recorded: Recorded, index: int) -> str | None:
    """The key of an adapter's trained point, if there is one; InputError for another domain's."""
    points, key = recorded.points, f"trained:{zoo.names[index]}"
    if key not in points.points:
        return None
    measured, domain = points.points[key].domain, recorded.domains[index]
    if measured != domain:
        reason = f"was measured on domain {measured!r}, and is of {domain!r} here"
        raise InputError(reason, path=points.path, key=key)
    return key


def _cosine(e: Effects, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ratio(e.cross[a, b], np.sqrt(e.fisher[a, a]) * np.sqrt(e.fisher[a, b]))


def _trained(data: PointData, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return data.trained.first[a, b] + data.trained.fisher[a, b] / 2


def _base(data: PointData, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return data.base.first[a, b] + data.base.fisher[a, b] / 2 + data.base.cross[a, b]


_TRAINED = "the model with {a}'s update, on {a}'s domain"
_GAIN = "{a}'s gain there (its base loss less its own; undefined where it has none)"

_COLUMNS = (
    *directed(
        "first_order_trained", "First-order effect of {b} on the trained {a}",
        f"g_{{b}}: derivative along W_{{b}} of the loss of {_TRAINED}, labels the data's, in nats "
        "per token. Near 0 where training has converged.",
        lambda data, a, b: data.trained.first[a, b], null=0.0, null_text="0", source="standard",
    ),
    *directed(
        "curvature_trained", "Curvature along {b} at the trained {a}",
        f"F_{{b}}{{b}} / 2 of {_TRAINED}, labels drawn from that model: by how many nats per token "
        "W_{b} raises the loss to second order.",
        lambda data, a, b: data.trained.fisher[a, b] / 2, low=0.0, source="standard",
    ),
    *directed(
        "damage_trained", "Predicted damage of {b} to {a}",
        "(first_order_trained + curvature_trained) / " + _GAIN + ": the share of what {a} has "
        "learned that adding W_{b} undoes, to second order. 1: all of it.",
        lambda data, a, b: ratio(_trained(data, a, b), data.gain[a]), source="ours",
    ),
    *directed(
        "curvature_share_trained", "Curvature of {b} at {a}, of {a}'s gain",
        "curvature_trained / " + _GAIN + ".",
        lambda data, a, b: ratio(data.trained.fisher[a, b] / 2, data.gain[a]), low=0.0,
        source="ours",
    ),
    *directed(
        "curvature_top_module_trained", "Share of {b}'s curvature at {a} in one module",
        f"Of the curvatures of W_{{b}}'s single modules at {_TRAINED}, the largest over their sum "
        "(what modules do together is left out).",
        lambda data, a, b: data.top_module[a, b], low=0.0, high=1.0, source="ours",
    ),
    *sided(
        "fisher_cosine_trained", "Fisher cosine at the trained {a}",
        "F_ab / sqrt(F_aa F_bb), labels drawn from the model, of " + _TRAINED + ": whole texts, "
        "whole network.",
        lambda data, own, other: _cosine(data.trained, own, other),
        low=-1.0, high=1.0, null=0.0, null_text="0", bounded=(-1.0, 1.0), source="standard",
    ),
    *directed(
        "first_order_base", "First-order effect of {b} on the base model, {a}'s domain",
        "g_{b}: derivative along W_{b} of the base model's loss on whole texts of {a}'s domain, in "
        "nats per token.",
        lambda data, a, b: data.base.first[a, b], null=0.0, null_text="0", source="standard",
    ),
    *directed(
        "curvature_base", "Curvature along {b} at the base model, {a}'s domain",
        "F_{b}{b} / 2 of the base model on whole texts of {a}'s domain, labels drawn from it, in "
        "nats per token.",
        lambda data, a, b: data.base.fisher[a, b] / 2, low=0.0, source="standard",
    ),
    *directed(
        "damage_base", "Predicted damage of {b} to {a}, from the base",
        "(g_{b} + F_{b}{b} / 2 + F_ab) / " + _GAIN + ", all of the base model on {a}'s domain: how "
        "much higher its quadratic model puts the loss with both updates than with {a}'s alone.",
        lambda data, a, b: ratio(_base(data, a, b), data.gain[a]), source="ours",
    ),
)  # fmt: skip


def _self(values: np.ndarray) -> np.ndarray:
    return np.diagonal(values).copy()


_ADAPTERS = (
    AdapterColumn(
        "base_loss", "Loss of the base model",
        "Mean over texts of the adapter's domain, in nats per label token, without the adapter.",
        lambda data: data.base_loss, source="standard",
    ),
    AdapterColumn(
        "trained_loss", "Own loss",
        "The same with the adapter.", lambda data: data.trained_loss, source="standard",
    ),
    AdapterColumn(
        "gain", "Gain",
        "base_loss - trained_loss: what the adapter has learned, in nats per token of its domain.",
        lambda data: data.gain, source="standard",
    ),
    AdapterColumn(
        "gain_standard_error", "Standard error of the gain",
        "From the scatter of the gain between texts; undefined for a single one.",
        lambda data: data.gain_error, source="standard",
    ),
    AdapterColumn(
        "self_first_order_trained", "Own first-order effect, trained",
        "Derivative of the adapter's own loss along its own update, in nats per token: near 0 "
        "where training has converged, below 0 where more of the same would still help.",
        lambda data: _self(data.trained.first), source="standard",
    ),
    AdapterColumn(
        "self_curvature_trained", "Own curvature, trained",
        "F_aa / 2 at the adapter's own trained weights, labels drawn from that model.",
        lambda data: _self(data.trained.fisher) / 2, source="standard",
    ),
)  # fmt: skip

FAMILY = Family(
    "points",
    lambda r: None if r.points is not None else "points of adapters (calibrate --adapters)",
    _compute, _COLUMNS, _ADAPTERS, title="Loss at trained weights and at the base model",
    made_from="",
)  # fmt: skip
