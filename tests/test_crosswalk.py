"""Other tools' pair metrics under their names: formulas from their sources on dense float64 deltas.

``paper_*`` follow mergeability.py of Rose-STL-Lab/demystifying-mergeability (2601.22285),
``gradience_*`` spectral_compat.py of gradience, but for what the remarks of CROSSWALK say.
"""

from __future__ import annotations

import itertools
import math

import gradient_truth as truth
import numpy as np
import pytest
from adapters import make_adapter
from test_features import MODULES, NAMES, block_diagonal, random_zoo
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import crosswalk_tiles, select

PAPER = mpf.CROSSWALK["2601.22285"]
SHAPES = {n: shape[:2] for n, shape in MODULES.items()}
THEIRS = [
    "task_vector_cosine_similarity", "task_vector_l2_distance", "task_vector_dot_product",
    "weight_space_angle", "task_vector_magnitude_ratio", "effective_rank",
    "effective_rank_mergeability_score", "stable_rank", "spectral_gap", "singular_value_ratio",
    "layerwise_effective_rank", "layerwise_effective_rank_mergeability_score",
    "singular_value_overlap", "subspace_overlap", "right_subspace_overlap_top_k",
    "right_subspace_overlap_bottom_k", "interaction_matrix_overlap_top_k",
    "interaction_matrix_overlap_bottom_k", "activation_l2_distance",
    "activation_cosine_similarity", "activation_magnitude_ratio", "activation_dot_product",
    "encoder_gradient_cosine_similarity", "encoder_gradient_l2_distance",
    "encoder_gradient_dot_product", "input_gradient_cosine_similarity",
    "input_gradient_l2_distance", "input_gradient_dot_product",
]  # fmt: skip


def effective_rank(v, w):
    s = np.linalg.svd(np.stack([v.ravel(), w.ravel()]), compute_uv=False)
    p = s / s.sum()
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def paper_global(v, w):
    """Of two flattened updates."""
    v, w = v.ravel(), w.ravel()
    lengths = np.linalg.norm(v), np.linalg.norm(w)
    cosine = v @ w / np.prod(lengths)
    s = np.linalg.svd(np.stack([v, w]), compute_uv=False)
    rank = effective_rank(v, w)
    return {
        "task_vector_cosine_similarity": cosine,
        "task_vector_l2_distance": np.linalg.norm(v - w),
        "task_vector_dot_product": v @ w,
        "weight_space_angle": math.degrees(math.acos(np.clip(cosine, -1, 1))),
        "task_vector_magnitude_ratio": min(lengths) / max(lengths),
        "effective_rank": rank,
        "effective_rank_mergeability_score": min(max(2 - rank, 0), 1),
        "stable_rank": s.sum() ** 2 / (s**2).sum(),
        "spectral_gap": (s[0] - s[1]) / s[0],
        "singular_value_ratio": s[1] / s[0],
    }


def paper_layerwise(pairs):
    """Of the modules that both change: [(delta, delta), ...]."""
    ranks = [effective_rank(v, w) for v, w in pairs]
    weights = [np.linalg.norm(v) + np.linalg.norm(w) for v, w in pairs]
    rank = np.average(ranks, weights=weights)
    return {
        "layerwise_effective_rank": rank,
        "layerwise_effective_rank_mergeability_score": min(max(2 - rank, 0), 1),
    }


def paper_subspaces(pairs, limit=10):
    """Mean over modules; k is the smaller rank where that is below their 10."""
    found = []
    for v, w in pairs:
        (u1, s1, v1), (u2, s2, v2) = (np.linalg.svd(x, full_matrices=False) for x in (v, w))
        r1, r2 = (int((s > 1e-6 * s[0]).sum()) for s in (s1, s2))
        k = min(limit, r1, r2)
        n = max(len(s1), len(s2))
        p, q = (np.pad(s[:100] / s.sum(), (0, n - len(s))) for s in (s1, s2))
        top = v1[:k] @ v2[:k].T
        bottom = v1[r1 - k : r1] @ v2[r2 - k : r2].T
        found.append({
            "singular_value_overlap": p @ q / np.linalg.norm(p) / np.linalg.norm(q),
            "subspace_overlap": np.linalg.norm(u1[:, :k].T @ u2[:, :k]) / math.sqrt(k),
            "right_subspace_overlap_top_k": np.linalg.norm(top) / math.sqrt(k),
            "right_subspace_overlap_bottom_k": np.linalg.norm(bottom) / math.sqrt(k),
            "interaction_matrix_overlap_top_k":
                (np.linalg.svd(top, compute_uv=False) ** 2).mean(),
            "interaction_matrix_overlap_bottom_k":
                (np.linalg.svd(bottom, compute_uv=False) ** 2).mean(),
        })  # fmt: skip
    return {name: np.mean([f[name] for f in found]) for name in found[0]}


def gradience_pairs(pairs):
    """Mean over modules, in both directions."""
    found = []
    for v, w in pairs:
        (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(x, full_matrices=False) for x in (v, w))
        ka, kb = (1 + int((np.cumsum(s**2) / (s**2).sum() < 0.9).sum()) for s in (sa, sb))
        cosines = np.linalg.svd(ua[:, :ka].T @ ub[:, :kb], compute_uv=False)

        def agreement(u, s, vt, k, other):
            along = np.diag(u[:, :k].T @ other @ vt[:k].T)
            return along @ s[:k] / np.linalg.norm(along) / np.linalg.norm(s[:k])

        found.append({
            "mean_overlap": cosines.mean(),
            "max_overlap": cosines.max(),
            "directional_agreement_a": agreement(ua, sa, va, ka, w),
            "directional_agreement_b": agreement(ub, sb, vb, kb, v),
            "scale_bounded_ratio": min(sa[0], sb[0]) / max(sa[0], sb[0]),
            "frob_bounded_ratio": min(np.linalg.norm(sa), np.linalg.norm(sb))
            / max(np.linalg.norm(sa), np.linalg.norm(sb)),
        })  # fmt: skip
    return {name: np.mean([f[name] for f in found]) for name in found[0]}


def both(x, y):
    """Deltas of the modules that both have and neither of which is zero."""
    shared = [n for n in NAMES if n in x.modules and n in y.modules]
    pairs = [(x.modules[n].delta, y.modules[n].delta) for n in shared]
    return [(v, w) for v, w in pairs if v.any() and w.any()]


def allowed(name, lengths):
    """From an inner product within bound("cosine") of the norms (see test_profiles.slack)."""
    c = bound("cosine")
    root = math.sqrt(2 * c)
    if "effective_rank" in name:
        return -8 * root * math.log(root)
    return {
        "task_vector_l2_distance": root * max(lengths), "weight_space_angle": math.degrees(root),
        "task_vector_dot_product": c * np.prod(lengths), "stable_rank": 4 * root,
        "spectral_gap": root, "singular_value_ratio": root,
        # products of two vectors off by "feature" each, over what they add up to
        "directional_agreement_a": 2e-5, "directional_agreement_b": 2e-5,
    }.get(name, 2 * bound("feature"))  # fmt: skip


def wide_zoo(folder, rng):
    """Ranks above and below 10, in all combinations."""
    for i, rank in enumerate((14, 12, 10, 6, 3, 15)):
        sizes = {n: (*MODULES[n][:2], min(rank, *MODULES[n][:2])) for n in NAMES[: 5 - i % 2]}
        yield make_adapter(folder / f"adapter_{i}", sizes, seed=int(rng.integers(2**32)))


@pytest.mark.parametrize("kind", ["ragged", "wide", "small blocks"])
def test_every_metric_is_its_formula(rng, isa, tmp_path, monkeypatch, kind):
    if kind == "small blocks":
        monkeypatch.setattr(crosswalk_tiles, "ROWS", 20)
    made = random_zoo(tmp_path, rng) if kind == "ragged" else list(wide_zoo(tmp_path, rng))
    table = mpf.pair_features(mpf.open_zoo(tmp_path), ["2601.22285", "gradience"])
    checked = 0
    for row, (x, y) in enumerate(itertools.combinations(made, 2)):
        a, b = block_diagonal(x, SHAPES), block_diagonal(y, SHAPES)
        pairs = both(x, y)
        want = dict.fromkeys(table, math.nan)
        del want["a"], want["b"]
        if a.any() and b.any():
            want |= paper_global(a, b)
        if pairs:
            want |= paper_layerwise(pairs) | paper_subspaces(pairs) | gradience_pairs(pairs)
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        for name, value in want.items():
            close = allowed(name, lengths)
            assert table[name][row] == pytest.approx(value, abs=close, nan_ok=True), (row, name)
            checked += not math.isnan(value)
    assert checked > 300


def test_the_bounds_catch_other_definitions(rng, tmp_path):
    x, y = itertools.islice(wide_zoo(tmp_path, rng), 2)
    pairs, lengths = both(x, y), (1.0, 1.0)
    right, over_9 = paper_subspaces(pairs), paper_subspaces(pairs, 9)
    for name in right:
        if name != "singular_value_overlap":
            assert abs(right[name] - over_9[name]) > allowed(name, lengths), name
    plain = np.mean([effective_rank(v, w) for v, w in pairs])
    weighted = paper_layerwise(pairs)["layerwise_effective_rank"]
    assert plain != weighted
    swapped = gradience_pairs([(w, v) for v, w in pairs])["directional_agreement_a"]
    ours = gradience_pairs(pairs)["directional_agreement_a"]
    assert abs(swapped - ours) > allowed("directional_agreement_a", lengths)


def test_there_are_all_28_and_what_is_offered_is_a_column(tmp_path):
    assert list(PAPER) == THEIRS
    make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", seed=1)
    table = mpf.pair_features(mpf.open_zoo(tmp_path), "2601.22285")
    from_weights = THEIRS[:18]
    assert list(table) == ["a", "b", *sorted(from_weights, key=THEIRS.index)]
    for crossing in PAPER.values():
        assert crossing.remark
        assert (crossing.declared is None) == crossing.name.startswith("input_gradient")
        assert crossing.declared is None or crossing.declared.name == crossing.name


def test_ours_are_names_of_statistics():
    for crossings in mpf.CROSSWALK.values():
        for c in crossings.values():
            for name in c.ours:
                base, _, aggregate = name.partition(".")
                assert base in mpf.FEATURES, (c.name, name)
                assert mpf.FEATURES[base].of == c.of
                assert not aggregate or aggregate in mpf.FEATURES[base].aggregates


def test_on_a_calibration(rng, tmp_path):
    made = truth.make_zoo(tmp_path / "zoo", rng)
    calibration = truth.calibrate(tmp_path, rng)
    zoo = mpf.open_zoo(tmp_path / "zoo")
    domains = dict(zip(zoo.names, truth.OWN, strict=True))
    table = mpf.pair_features(zoo, "2601.22285", calibration=calibration.path, domains=domains)
    assert [n for n in table if n not in "ab"] != [] and set(THEIRS[18:25]) < set(table)
    gradient = {d: truth.token_gradients(calibration, d).mean(0) for d in truth.DOMAINS}
    for row, (i, j) in enumerate(itertools.combinations(range(len(made)), 2)):
        g, h = gradient[truth.OWN[i]], gradient[truth.OWN[j]]
        scale = max(np.linalg.norm(g), np.linalg.norm(h))
        for name, value, close in (
            ("cosine_similarity", g @ h / np.linalg.norm(g) / np.linalg.norm(h), 1e-5),
            ("dot_product", g @ h, 1e-5 * scale**2),
            ("l2_distance", np.linalg.norm(g - h), 1e-3 * scale),
        ):
            assert table[f"encoder_gradient_{name}"][row] == pytest.approx(value, abs=close), name
        on_both = [activations(made[i], made[j], calibration, truth.OWN[k]) for k in (i, j)]
        for name in on_both[0]:
            value, close = np.mean([v[name] for v in on_both], axis=0)
            got = table[f"activation_{name}"][row]
            assert got == pytest.approx(value, abs=close, nan_ok=True), name


def activations(x, y, calibration, domain):
    """What two adapters add to the mean outputs, all modules' one after the other; with slack.

    Each output is off by c = bound("on domains") of |W| |mean|, S in all: so are products by
    c (|p| S_q + |q| S_p), ratios by that over the lengths, distances by the root where they vanish.
    """
    names = ("l2_distance", "cosine_similarity", "magnitude_ratio", "dot_product")
    if not all(any(m.delta.any() for m in z.modules.values()) for z in (x, y)):
        return dict.fromkeys(names, (math.nan, 0.0))
    sides, sizes = [], []
    for z in (x, y):
        parts, size = [], 0.0
        for n in truth.NAMES:
            mean = calibration.inputs[domain, truth.SHARED.get(n, n)].mean(0)
            delta = z.modules[n].delta if n in z.modules else np.zeros(truth.MODULES[n][:2])
            parts.append(delta @ mean)
            size += (np.linalg.norm(delta) * np.linalg.norm(mean)) ** 2
        sides.append(np.concatenate(parts))
        sizes.append(math.sqrt(size))
    (p, q), c = sides, bound("on domains")
    n, m = np.linalg.norm(p), np.linalg.norm(q)
    of_product = c * (n * sizes[1] + m * sizes[0])
    of_ratio = 2 * c * (sizes[0] / n + sizes[1] / m)
    of_square = 2 * (of_product + c * (n * sizes[0] + m * sizes[1]))
    distance = np.linalg.norm(p - q)
    of_distance = min(of_square / distance, math.sqrt(of_square)) if distance else (
        math.sqrt(of_square)
    )
    values = distance, p @ q / (n * m), min(n, m) / max(n, m), p @ q
    return dict(zip(names, zip(values, (of_distance, of_ratio, of_ratio, of_product), strict=True),
                    strict=True))  # fmt: skip


def test_bottom_k_beyond_the_rank_is_arbitrary(rng, tmp_path):
    """Why theirs is not offered as it is: the same updates, rounded anew."""
    made = [make_adapter(tmp_path / str(i), {NAMES[0]: (60, 50, 4)}, seed=i) for i in range(2)]
    deltas = [m.modules[NAMES[0]].delta for m in made]

    def theirs(v, w, k=10):
        right = [np.linalg.svd(x, full_matrices=False)[2][-k:] for x in (v, w)]
        return np.linalg.norm(right[0] @ right[1].T) / math.sqrt(k)

    # By chance one rounding may give nearly the same number.
    again = [tuple(w * (1 + 1e-15 * rng.standard_normal(w.shape)) for w in deltas)
             for _ in range(8)]  # fmt: skip
    assert max(abs(theirs(*deltas) - theirs(*d)) for d in again) > 1e-3
    offered = [paper_subspaces([d])["right_subspace_overlap_bottom_k"]
               for d in (tuple(deltas), *again)]  # fmt: skip
    assert offered == pytest.approx([offered[0]] * len(offered), abs=1e-11)


def test_groups_stand_in_lists_and_bring_no_name_twice():
    names = [f.name for f in select(["default", "2601.22285", "cosine"])]
    assert len(names) == len(set(names)) and {"cosine", "weight_space_angle"} < set(names)
    assert {f.name for f in select(["all", "default"])} == {f.name for f in select("all")}
    with pytest.raises(InputError, match="a feature is named twice"):
        select(["all", "cosine", "cosine"])
    other = PAPER["stable_rank"].declared
    with pytest.raises(InputError, match="two features are called 'stable_rank'"):
        select(["2601.22285", type(other)("stable_rank", "", "", other.finish, other.needs)])
