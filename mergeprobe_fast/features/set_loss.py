"""Statistics of sets from points: the loss that a merge costs each member, to second order.

At member j's own trained point, with phi_i[s] the derivative of text s's loss along W_i,
``dL_j(w) = g_j . (w - 1_j) + (w - 1_j)^T F_j (w - 1_j) / 2``: g_j the mean of phi, labels the
data's, and F_j that of tokens_s phi phi^T, labels drawn from the model there (the Fisher of the
mean loss). Divided by what j has gained over the base it is the share of its learning undone.
"""

from __future__ import annotations

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.features.points import columns_of, trained_point
from mergeprobe_fast.features.set_declare import (
    SetFeature,
    SetGroup,
    SetRequest,
    Values,
    over,
    plain,
)
from mergeprobe_fast.features.set_modules import used_adapters

# The model of each loss holds near that member's own weights; |w - given| / |given| at most this.
TRUST = 0.5
_BATCH_VALUES = 4_000_000
_HALVINGS = 80


@_env.one_blas_thread()
def _loss(request: SetRequest) -> Values:
    used = used_adapters(request)
    first, fisher = _models(request, used)
    place = np.zeros(len(request.zoo), np.int64)
    place[used] = np.arange(len(used))
    shape = request.members.shape
    out = {name: np.full(shape, np.nan) for name in ("change", "trusted_change", "weights")}
    size = np.count_nonzero(request.members >= 0, axis=1)
    for k in np.unique(size):
        step = max(1, _BATCH_VALUES // int(k) ** 3)
        rows = np.flatnonzero(size == k)
        for s in (rows[at : at + step] for at in range(0, len(rows), step)):
            at = place[request.members[s, :k]]
            g = first[at[:, :, None], at[:, None, :]]
            f = fisher[at[:, :, None, None], at[:, None, :, None], at[:, None, None, :]]
            given = request.weights[s, :k]
            trusted = _trusted(g, f, given)
            for name, value in (("change", _changes(g, f, given)), ("weights", trusted),
                                ("trusted_change", _changes(g, f, trusted))):  # fmt: skip
                out[name][s, :k] = value
    return out


def _models(request: SetRequest, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """g_j (victims, n) and F_j (victims, n, n) over the gain of j; NaN without point or gain."""
    zoo, recorded, n = request.zoo, request.recorded, len(used)
    points = recorded.points
    first, fisher = np.full((n, n), np.nan), np.full((n, n, n), np.nan)
    adapters, at = columns_of(zoo, points, used)
    known = np.searchsorted(used, adapters)
    for i, k in zip(adapters, known, strict=True):
        key = trained_point(zoo, recorded, int(i))
        if key is None:
            continue
        base, here, tokens = points.losses(key)
        gain = float(base.mean() - here.mean())
        if gain <= 0:
            continue
        phi = points.phi(key, "model")[:, at]
        first[k, known] = points.phi(key, "data")[:, at].mean(axis=0) / gain
        fisher[np.ix_([k], known, known)] = (phi.T * tokens) @ phi / (len(phi) * gain)
    return first, fisher


def _changes(g: np.ndarray, f: np.ndarray, w: np.ndarray) -> np.ndarray:
    """dL_j(w), (sets, k), from g (sets, k, k) and f (sets, k, k, k)."""
    d = w[:, None, :] - np.eye(w.shape[1])
    curved = np.matmul(f, d[..., None])[..., 0]
    return ((g + curved / 2) * d).sum(axis=-1)


def _trusted(g: np.ndarray, f: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The w that makes the mean of all dL_j least within |w - given| <= TRUST |given|, (sets, k).

    Step d solves (F + nu) d = -p, p the gradient at ``given``; nu is 0 where that is short enough,
    else it is bisected until |d| is the radius.
    """
    k = given.shape[1]
    fisher = f.mean(axis=1)
    defined = np.isfinite(fisher).all(axis=(1, 2)) & np.isfinite(g).all(axis=(1, 2))
    out = np.full(given.shape, np.nan)
    g, f, fisher, given = (x[defined] for x in (g, f, fisher, given))
    d = given[:, None, :] - np.eye(k)
    slope = (g + np.matmul(f, d[..., None])[..., 0]).mean(axis=1)
    values, vectors = np.linalg.eigh(fisher)
    values = np.maximum(values, 0.0)
    along = np.matmul(slope[:, None, :], vectors)[:, 0]
    radius = TRUST * np.linalg.norm(given, axis=1)

    def step(nu: np.ndarray) -> np.ndarray:
        under = values + nu[:, None]
        endless = np.where(along == 0, 0.0, np.inf)  # a slope without curvature
        return np.divide(along, under, out=endless, where=under > 0)

    # Curvature that is rounding of the largest is none: there only the radius ends the step.
    low = 1e-12 * values.max(axis=1, initial=0.0)
    length = np.linalg.norm(along, axis=1)
    high = low + length / np.where(radius > 0, radius, 1.0)
    inside = np.linalg.norm(step(low), axis=1) <= radius
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        long = np.linalg.norm(step(middle), axis=1) > radius
        low, high = np.where(long & ~inside, middle, low), np.where(long | inside, high, middle)
    moved = np.where(inside[:, None], step(low), step(high))
    moved *= (radius > 0)[:, None]
    out[defined] = given - np.matmul(vectors, moved[..., None])[..., 0]
    return out


_DEFINITION = (
    "dL_j(w) over the gain of member j (base loss less its own; undefined where it has none): the "
    "share of what it has learned that the merge undoes, to second order, on texts of its domain. "
)

GROUPS = (
    SetGroup(
        "loss",
        lambda r: None if r.points is not None else "points of adapters (calibrate --adapters)",
        _loss,
        (
            *(
                SetFeature(f"{name}_{short}", f"{title}, {text}", _DEFINITION + more,
                           over(how, key), source="ours")
                for name, key, title, more in (
                    ("loss_change", "change", "Predicted loss",
                     "With the weights of the set."),
                    ("trusted_loss_change", "trusted_change", "Predicted loss, best weights",
                     "With the weights that make its mean least within a ball of half the length "
                     "of those of the set, around them: further out the model does not hold."),
                )
                for how, short, text in (("max", "worst", "the worst member"),
                                         ("mean", "mean", "mean over members"))
            ),
            *(
                SetFeature(name, title, "Of each member. " + _DEFINITION, plain(key),
                           source="ours", per_member=True)
                for name, key, title in (
                    ("loss_change", "change", "Predicted loss"),
                    ("trusted_weights", "weights", "Weights of least predicted loss"),
                )
            ),
        ),
    ),
)  # fmt: skip
