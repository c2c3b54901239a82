"""Features of the base model's loss gradients, from the sampled tokens of a calibration.

Everything is at the base weights ("base" in the names), where the gradients were recorded, and over
the modules that any adapter of the zoo has. The mean gradient G of a domain, and derivatives of the
loss along deltas, are in nats per token of the domain's texts, whether it has a label or not; the
tokens that a calibration skips at the start of each text are left out.

The Fisher features are of single tokens: E phi_a phi_b over the sampled tokens t, where phi_i is
what token t's inputs and output gradients add to the derivative along W_i. (Whole texts, at trained
weights too: features/points.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.engine import gradients as engine
from mergeprobe_fast.features.declare import AdapterColumn, Family, PairColumn, ratio
from mergeprobe_fast.features.twins import directed, sided
from mergeprobe_fast.ops import block_gram
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo


@dataclass(frozen=True, eq=False)
class FisherData:
    """``own`` (N,): index of each adapter's domain; ``second`` (D, N, N): E phi_i phi_j there."""

    own: np.ndarray
    second: np.ndarray


@dataclass(frozen=True, eq=False)
class GradientData(FisherData):
    """What gradients of the loss on the data's own labels say.

    ``mean``, ``error`` (D, N): derivative along each delta and its standard error; ``gradients``:
    the engine's; ``variance`` (D,): of the mean gradient, summed over entries; ``sequences`` (D,):
    texts that tokens were sampled from.
    """

    mean: np.ndarray
    error: np.ndarray
    gradients: engine.Gradients
    variance: np.ndarray
    sequences: np.ndarray

    @property
    def length(self) -> np.ndarray:
        """(D,) norms of the gradients."""
        return np.sqrt(np.diagonal(self.gradients.gram))


def _domains(recorded: Recorded) -> tuple[list[str], np.ndarray]:
    """The domains that adapters have, and the index of each adapter's."""
    domains = sorted(set(recorded.domains))  # whatever the order of the adapters
    return domains, np.array([domains.index(d) for d in recorded.domains])


def _second(along: engine.Along, threads: int) -> np.ndarray:
    """(D, N, N): the mean of phi_i phi_j over the tokens of each domain."""
    out = []
    for tokens, phi in zip(along.tokens, along.phi, strict=True):
        count = phi.shape[1]
        gram = block_gram(
            phi.T, np.ones((count, 1)), np.arange(count + 1), accumulate="fp64", threads=threads
        )
        out.append(gram / tokens.count)
    return np.array(out)


def _mean_and_error(tokens: engine.Tokens, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over tokens and its standard error, (N,) each: texts are independent, tokens are not.

    The error of a ratio of sums over texts, linearised: sum_s (phi_s - n_s mean)^2 / T^2, times
    S / (S - 1). NaN for a single text.
    """
    mean = phi.mean(axis=0)
    off = tokens.per_sequence(phi) - np.diff(tokens.starts)[:, None] * mean
    return mean, np.sqrt(_unbiased(np.square(off).sum(axis=0), tokens))


def _unbiased(squares: np.ndarray, tokens: engine.Tokens) -> np.ndarray:
    """Variance of a mean over tokens from the summed squares of the texts' deviations."""
    sequences = len(tokens.starts) - 1
    if sequences < 2:
        return np.full_like(squares, np.nan)
    return squares * (sequences / (sequences - 1) / tokens.count**2)


def _variance(g: engine.Gradients, d: int) -> float:
    """Of the mean gradient of domain d, summed over its entries, from the scatter of its texts."""
    tokens = g.along.tokens[d]
    n, square, dot = np.diff(tokens.starts), g.sequence_square[d], g.sequence_dot[d]
    scatter = square.sum() - 2 * (n @ dot) / tokens.count + (n @ n) * g.gram[d, d]
    return float(_unbiased(np.array(max(scatter, 0.0)), tokens))  # below 0 by rounding only


def _compute(zoo: Zoo, recorded: Recorded, threads: int) -> GradientData:
    domains, own = _domains(recorded)
    g = engine.gradients(zoo, recorded.calibration, domains, own, "data", threads)
    pairs = [_mean_and_error(t, p) for t, p in zip(g.along.tokens, g.along.phi, strict=True)]
    return GradientData(
        own, _second(g.along, threads),
        np.array([mean for mean, _ in pairs]), np.array([error for _, error in pairs]), g,
        np.array([_variance(g, d) for d in range(len(domains))]),
        np.array([len(t.starts) - 1 for t in g.along.tokens]),
    )  # fmt: skip


def _compute_fisher(zoo: Zoo, recorded: Recorded, threads: int) -> FisherData:
    domains, own = _domains(recorded)
    along = engine.along(zoo, recorded.calibration, domains, "model", threads)
    return FisherData(own, _second(along, threads))


def _lacks(labels: str, recorded: Recorded) -> str | None:
    if recorded.calibration is None or labels not in recorded.calibration.labels:
        return f"a calibration with gradients of {labels} labels (--gradients --labels {labels})"
    return None


def _gradient_cosine(data: GradientData, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    first, second = data.own[a], data.own[b]
    return ratio(data.gradients.gram[first, second], data.length[first] * data.length[second])


def _alignment(data: GradientData, victim: np.ndarray, partner: np.ndarray) -> np.ndarray:
    d = data.own[victim]
    return ratio(data.mean[d, partner], data.length[d] * data.gradients.norm[partner])


def _snr(data: GradientData, victim: np.ndarray, partner: np.ndarray) -> np.ndarray:
    d = data.own[victim]
    return ratio(data.mean[d, partner], data.error[d, partner])


def _fisher_cosine(data: FisherData, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    f, d = data.second, data.own[own]
    return ratio(f[d, own, other], np.sqrt(f[d, own, own]) * np.sqrt(f[d, other, other]))


def _cross_to_self(data: FisherData, victim: np.ndarray, partner: np.ndarray) -> np.ndarray:
    d = data.own[victim]
    return np.sqrt(ratio(data.second[d, partner, partner], data.second[d, victim, victim]))


def _fisher_columns(prefix: str, labels: str) -> tuple[PairColumn, ...]:
    word = "empirical Fisher" if prefix else "Fisher"
    title = word[0].upper() + word[1:]
    return (
        *sided(
            f"{prefix}fisher_cosine_base", f"{title} cosine on {{a}}'s domain",
            f"E phi_a phi_b / sqrt(E phi_a^2 E phi_b^2) over tokens of {{a}}'s domain, phi_i the "
            f"derivative of the base model's loss along W_i, labels {labels}: the cosine of the "
            f"two updates as the {word} metric sees them, across all modules.",
            _fisher_cosine, low=-1.0, high=1.0, null=0.0, null_text="0", bounded=(-1.0, 1.0),
            source="Kunstner et al. 2019 on the two kinds of labels",
        ),
        *directed(
            f"{prefix}fisher_cross_to_self_base", f"{title} cross to self, on {{a}}'s domain",
            f"sqrt(E phi_{{b}}^2 / E phi_{{a}}^2) over tokens of {{a}}'s domain, labels {labels}: "
            f"what {{b}} does to the base model's predictions there, in units of what {{a}} does.",
            _cross_to_self, low=0.0, source="ours",
        ),
    )  # fmt: skip


_COLUMNS = (
    PairColumn(
        "gradient_cosine_base", "Cosine of the domains' gradients",
        "<G_a, G_b> / (|G_a| |G_b|), G_i the base model's mean loss gradient on adapter i's "
        "domain, labels the data's. 1 for two adapters of one domain. Sampling noise draws it "
        "towards 0. Positive: the two tasks want the weights moved the same way.",
        _gradient_cosine, low=-1.0, high=1.0, null=0.0, null_text="0", bounded=(-1.0, 1.0),
        source="Yu et al. 2020, gradient surgery",
    ),
    *directed(
        "first_order_sampled_base", "What {b} does to {a}'s loss, first order",
        "<G_{a}, W_{b}> in nats per token: the derivative of the base model's loss on {a}'s domain "
        "along {b}'s update. Below 0, {b} helps there to first order. 0 for an update that is 0.",
        lambda data, victim, partner: data.mean[data.own[victim], partner],
        null=0.0, null_text="0", source="standard",
    ),
    *directed(
        "gradient_alignment_base", "Alignment of {b} with {a}'s gradient",
        "<G_{a}, W_{b}> / (|G_{a}| |W_{b}|), G_{a} the base model's gradient on {a}'s domain. "
        "Below 0, {b} goes down {a}'s loss.",
        _alignment, low=-1.0, high=1.0, null=0.0, null_text="0", bounded=(-1.0, 1.0),
        source="standard",
    ),
    *directed(
        "gradient_snr_base", "First-order effect of {b} on {a}, in standard errors",
        "<G_{a}, W_{b}> over its standard error, which the scatter between the texts of {a}'s "
        "domain gives. Within 2 or so of 0, its sign is not known. Undefined for a single text.",
        _snr, null=0.0, null_text="0, standard deviation 1", source="ours",
    ),
    *_fisher_columns("empirical_", "the data's own"),
)  # fmt: skip


def _own(data: GradientData, values: np.ndarray) -> np.ndarray:
    """Of each adapter's own domain, from one per domain."""
    return values[data.own]


def _noise_scale(data: GradientData) -> np.ndarray:
    signal = np.square(data.length) - data.variance
    return _own(data, ratio(data.sequences * data.variance, signal))


def _self(value: str) -> Callable[[GradientData], np.ndarray]:
    """A directed column of the pair (i, i)."""
    finish = next(c.finish for c in _COLUMNS if c.name == f"{value}_a_by_b")

    def of(data: GradientData) -> np.ndarray:
        each = np.arange(len(data.own))
        return finish(data, each, each)

    return of


_ADAPTERS = (
    AdapterColumn(
        "first_order_sampled_base_self", "Own first-order effect",
        "<G, W> in nats per token: the derivative of the base model's loss on the adapter's own "
        "domain along its update.",
        _self("first_order_sampled_base"), source="standard",
    ),
    AdapterColumn(
        "gradient_alignment_base_self", "Alignment with the own gradient",
        "<G, W> / (|G| |W|) on the adapter's own domain.",
        _self("gradient_alignment_base"), source="standard",
    ),
    AdapterColumn(
        "sensitive_atoms_base", "Sensitive atoms, effective number",
        "(sum_k |g_k|)^2 / sum_k g_k^2 with g_k = <G, sigma_k u_k v_k^T> over the singular triples "
        "of all modules, G of the adapter's own domain: on how many of them its effect rests.",
        lambda data: ratio(np.square(data.gradients.atoms_sum), data.gradients.atoms_square),
        source="after TARA, on canonical atoms",
    ),
    AdapterColumn(
        "top_atom_share_base", "Share of the most sensitive atom",
        "max_k |g_k| / sum_k |g_k|, g_k as in sensitive_atoms_base.",
        lambda data: ratio(data.gradients.atoms_top, data.gradients.atoms_sum),
        source="after TARA, on canonical atoms",
    ),
    AdapterColumn(
        "gradient_variance_base", "Gradient variance",
        "Trace of the covariance of a text's contribution to the mean gradient of the adapter's "
        "domain: the variance of G, from the scatter between texts, times their number. "
        "(nats per token)^2; undefined for a single text.",
        lambda data: _own(data, data.sequences * data.variance), source="McCandlish et al. 2018",
    ),
    AdapterColumn(
        "gradient_noise_scale_base", "Gradient noise scale",
        "Texts (as many tokens of each as were sampled) at which noise and signal of the mean "
        "gradient are equal: gradient_variance_base / (|G|^2 - variance of G). Undefined where "
        "that signal is not above 0, and for a single text.",
        _noise_scale, source="McCandlish et al. 2018, debiased",
    ),
)  # fmt: skip

FAMILY = Family(
    "gradients", lambda recorded: _lacks("data", recorded), _compute, _COLUMNS, _ADAPTERS,
    title="Gradients of the base model", made_from="",
)  # fmt: skip
# Apart, because a calibration may have one kind of labels without the other.
FISHER_FAMILY = Family(
    "fisher", lambda recorded: _lacks("model", recorded), _compute_fisher,
    _fisher_columns("", "drawn from the model"), title="Fisher information of the base model",
    made_from="",
)  # fmt: skip
