"""Every tolerance of the numeric tests, derived, in one table, each with what must break it.

u is the unit roundoff (2^-24 or 2^-53). Sums of n terms err by at most n u, and by about sqrt(n) u
where roundings are independent (Higham and Mary 2019): lambda sqrt(n) u with lambda = 3 is exceeded
once in a thousand for one entry in theory, and measured errors are 0.05 to 0.6 sqrt(n) u.
Errors are componentwise, relative to the same sum over absolute values, so a bound does not
loosen where terms cancel. The tests show that ``fault``, planted, exceeds the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

U32, U64 = 2.0**-24, 2.0**-53
LAMBDA = 3.0


@dataclass(frozen=True)
class Tolerance:
    """A bound, why it is what it is, and the planted fault that exceeds it."""

    value: float
    reason: str
    fault: str


def gram_bound(accumulate: str, p: int, q: int, widest: int, rows: int = 0) -> float:
    """|P - P_ref| <= bound * P(|U|, |V|): the error of one entry of the block Gram.

    The kernel sums kc products in a register (kc = 128 in float32, 64 in float64), then adds
    ceil(d / kc) such sums, then up to ``widest`` products of the two Grams. In float64 the
    reference rounds as much as the kernel does and sums p + q + rows terms in a row.
    """
    u, kc = (U32, 128) if accumulate == "fp32" else (U64, 64)

    def chain(d: int) -> int:
        return min(d, kc) + -(-d // kc)

    terms = chain(p) + chain(q) + widest + 3
    if accumulate == "fp64":
        terms += p + q + rows
    return LAMBDA * u * terms**0.5


def streamed_bound(rank: int) -> float:
    """|S - S_ref| <= bound * S(|U|, |V|) where S is summed over entries of dense matrices.

    An entry is a chain of at most 128 of the ``rank`` products and one sum per 128, each with a
    rounded weight; 6144 entries of a tile are summed like those of ``gram_bound``, then float64.
    """
    entry = min(rank, 128) + -(-rank // 128) + 2
    return LAMBDA * U32 * (2 * entry + 128 + 6144 // 128) ** 0.5


def entry_bound(rank: int) -> float:
    """|x - x_ref| <= bound * |s| |B| |A| of one entry of a delta, from float32 factors.

    A chain of ``rank`` multiply-adds (twice as many roundings where there is no fused one), the
    scale's own rounding and its product.
    """
    return (2 * rank + 2) * U32


def rule_bound(n: int) -> float:
    """|m - m_ref| <= bound * sum_i |w_i rescale_i x_i| / |divisor|, from float32 entries.

    Per term two products, then n sums of terms and n of divisors, and a division.
    """
    return (2 * n + 5) * U32


def sketch_bound(d_in: int, d_out: int = 0) -> float:
    """|y - M x| <= bound * |M| |x| over d_in, and |z - M^T y| over d_out, from float32 M, x and y.

    Chains of 256 columns or 32 rows, then one sum per chain (twice without a fused multiply-add).
    """
    d, chain = (d_out, 32) if d_out else (d_in, 256)
    return (2 * min(d, chain) + -(-d // min(chain, 16)) + 2) * U32


def device_merge_bound(rank: int) -> float:
    """||M - M'|| <= bound * ||M||: a merge from factors on a device and on the CPU.

    Both round float64 numbers that agree to 1e-10 to float32: |db||a| + |b||da| of norm
    2 u32 ||b|| ||a|| <= 2 u32 sqrt(rank) ||M|| on each side, half as much again for roots of
    sums that cancel. Faults: factors or their inverse off by 1e-5.
    """
    return 6 * U32 * max(rank, 1) ** 0.5


TOLERANCES = {
    "prototype": Tolerance(
        5e-7, "of a unit vector from float64 canonical factors (gap 2 or more), rounded to float32 "
        "twice: 2 u32 = 1.2e-7; factors that were moved and rounded again, kappa = 5, add "
        "kappa sqrt(r) u32 = 6e-7 times sigma_2 / sigma_1 < 1/2", "the first row of A",
    ),
    "power iteration": Tolerance(
        1e-5, "15 steps of PEFT's in float32, sigma_2 / sigma_1 = 0.3: 0.09^15 of the start, and "
        "sqrt(d) u32 over a gap of 0.9 a step; measured 3e-7", "the second singular vector",
    ),
    "cosine": Tolerance(
        5e-7, "the project's promise for float32 accumulation; measured 2e-9 at N = 200",
        "the R x R Grams kept in bf16 (2e-4, CATALOGUE 10)",
    ),
    "exact_algebra": Tolerance(
        1e-11, "float64 on both sides, orthogonal or well conditioned (kappa < 1e2) transforms: "
        "kappa^2 sqrt(d) u with d <= 1000", "the inverse of the gauge left out",
    ),
    "sigma": Tolerance(
        2e-12, "of ||sB||_F ||A||_F: Cholesky factors of equilibrated float64 Grams are exact for "
        "Grams off by some 3 u, which moves a sigma by 3 u kappa / 2; they are repaired above "
        "kappa = 1e3, estimated up to sqrt(128) low; measured 1e-15, 4e-14 at worst",
        "sigma off by 1e-10",
    ),
    "orthonormal": Tolerance(
        1e-8, "the first Cholesky loses u kappa^2 and is repaired above kappa = 1e3 as its pivots "
        "estimate it, up to sqrt(n) low: u * 1e6 * 128; measured 1e-9", "rows 1e-7 too long",
    ),
    "float32 rows": Tolerance(
        1.3e-7, "inner products of orthonormal rows, every element rounded to float32: 2 u32 = "
        "1.2e-7, and 'orthonormal'; of sum sigma, a delta from rows rounded on both sides",
        "rows rounded to bfloat16",
    ),
    "projector": Tolerance(
        1e-9, "well conditioned and gapped: 10 u ||W|| kappa / gap with gap >= 1e-2, kappa <= 1e2",
        "the first vector left out",
    ),
    "feature": Tolerance(
        2e-6, "of a range of 1: canonical factors rounded to float32, products of two Grams summed "
        "over d and r in float32: gram_bound('fp32', 33, 33, 6) = 1.6e-6; measured 2e-7",
        "each definition with sides, denominators or directions exchanged",
    ),
    "singular values": Tolerance(
        1e-7, "of the largest: eigenvalues of X^T X in float64 to n u64 <= 1e-14, whose root at 0 "
        "is 1e-7; measured 3e-8", "the same in float32 (1e-4)",
    ),
    "angles": Tolerance(
        1e-6, "float64 from exact float32 factors: squares of cosines to 1e-15, so cosines, sines "
        "and angles to 3e-8 each, the root of up to 30 of them to 2e-7; what is divided by a "
        "cosine's square is floored at 1e-12; measured 1e-8", "sides, directions or norms "
        "exchanged, angles by arccos of float32 cosines (3e-4)",
    ),
    "on domains": Tolerance(
        2e-6, "'feature', on X V in float32: chains of d <= 31 terms, 3 sqrt(31) u = 1e-6 of "
        "|x| |v|; of what no cancellation would give, |W| |x|, on each of two sides",
        "a sample left out, another domain's samples, centred inputs, a biased HSIC",
    ),
    "spectrum": Tolerance(
        1e-10, "singular values are float64 from exact float32 factors; ratios of them",
        "sigma^2 normalised instead of sigma in the effective rank",
    ),
    "basis": Tolerance(
        1e-7, "of the norm, where a rule acts in a singular basis (core space, KnOTS) or on polar "
        "factors: float64 vectors are off by eps kappa^2 <= 1e-16 * 1e6 over a relative gap of "
        "1e-3; measured 1e-11", "another density, seed or share, or elections after weights",
    ),
    "gauge": Tolerance(
        1e-5, "moved factors are rounded to float32 again: kappa(M) sqrt(r) u32, kappa = 5, and "
        "'feature' on both sides", "a norm of the factors themselves",
    ),
    "probe": Tolerance(
        5e-6, "'feature', and gradients rounded to float32 before a solve with A or B: kappa u32 "
        "with kappa <= 50; measured 2e-7", "gradients left unprojected, sides or runs exchanged",
    ),
    "euler": Tolerance(
        2.0**-5, "<dA, A> and <dB, B> against |dA o A| + |dB o B| + |<dA, A>|: 8 u of bfloat16, "
        "with which forward and backward compute; measured 0.013 at worst (rank 1, 2 tokens)",
        "one byte of a gradient flipped, gradients of another module or at other factors",
    ),
    "tile_squares": Tolerance(
        1e-11, "float64 sums of float32 squares, which are exact there: n u64 with n <= 1e5",
        "one entry of 1e5 left out",
    ),
    "entry sums": Tolerance(
        LAMBDA * U32 * 387**0.5, "float32 sums of at most 1536 positive terms in 4, 8 or 16 lanes, "
        "of three roundings each: 384 + 3 terms; float64 from there on; measured 6e-8",
        "one of 2000 terms left out, sides exchanged, units mistaken",
    ),
    "entry columns": Tolerance(
        1e-5, "of ratios of sums over 180 entries and more, each off by entry_bound(6) = 14 u32 of "
        "|s| |B| |A|, which is some times the entry: 10 u32 sqrt(6), and u32 sqrt(387) 3 of the "
        "sums; entries whose sign or rank is undecided are counted apart",
        "other statistics or means over modules in a column's place, an energy off by a thousandth",
    ),
    "low_rank": Tolerance(
        1e-5, "the project's promise for the error of rank k, relative to the best; measured 1e-7",
        "no pass after the first (1e-3 for a flat spectrum)",
    ),
    "low_rank_floor": Tolerance(
        2e-5, "of ||M||: entries of M X are float32 sums of d_in <= 400 terms, off by sqrt(d_in) u "
        "of their own size, as much in M^T Y, over k <= 12 components; measured 7e-6",
        "a component of the merge left out",
    ),
    "low_rank_error": Tolerance(
        2e-5, "||M||^2 less what was captured, both to 1e-7 of ||M||^2, halved by the root, where "
        "1% of it or more is left out; below that the difference itself, in float32",
        "the error of rank k - 1",
    ),
    "bf16_gram": Tolerance(
        2.0**-7 + 2.0**-16, "X^T X of rows rounded to BF16, componentwise: 2 u + u^2 with u = 2^-8",
        "rows of other tokens",
    ),
    "likelihood": Tolerance(
        5e-6, "nats, of a float32 Llama of 3 layers: some 40 roundings in a row on logits below "
        "10, sqrt(40) u32 10 = 4e-6; measured 3e-7",
        "answers that see each other or are placed behind each other; the delta left out",
    ),
    "logistic": Tolerance(
        1e-4, "of the largest weight: slopes below 1e-7 over a curvature of at least the penalty "
        "1e-2 are 1e-5 a weight, and weights are 0.1 and more", "a penalty off by a hundredth, "
        "an example left out",
    ),
    "derivative": Tolerance(
        2e-5, "of ratios and cosines of derivatives y^T W x from float32 canonical factors: one "
        "token's is off by 3 u sqrt(100) = 2e-6 of the rms over tokens where directions are "
        "random, and few tokens or texts divide by a tenth of it; measured 2e-6 over 150 seeds",
        "tokens taken for texts, labels, domains or directions exchanged, raw atoms b_a a_a^T",
    ),
    "slope": Tolerance(
        1e-7, "derivatives of a loss of some nats by differences of fourth order at steps of 1e-3 "
        "in float64: 4 u64 L / h = 2e-12, and h^4 / 30 of a fifth derivative that may be 1e6; "
        "measured 2e-12, of one seed in six 4e-10",
        "labels, texts or adapters exchanged, the victim's own delta left out",
    ),
    "sets": Tolerance(
        1e-8, "float64 Grams of well conditioned sets (kappa < 1e3): u64 kappa^2 sqrt(k) = 1e-9, "
        "and a ridge of 1e-10 that errors feel times sum_j w_j^2 G_jj / G_ii < 1e2",
        "weights or a diagonal off by 1e-6, another member's domain",
    ),
    "set weights": Tolerance(
        1e-5, "of the largest: the ridge of 1e-10 moves them by as much times kappa^2 < 1e5",
        "the least squares of another set",
    ),
    "minimax error": Tolerance(
        1e-3, "of single members where the worst is known to 1e-7: e is smooth in w, which is off "
        "by the root of that over its curvature", "the errors of the best mean weights",
    ),
    "minimax weights": Tolerance(
        1e-3, "the root of the gap of 1e-7, over a curvature of about 1; measured 5e-5",
        "the best mean weights",
    ),
    "minimax gap": Tolerance(
        2e-7, "it is 1e-7 of the worst error or less, wherever the iteration ended",
        "the gap of equal multipliers",
    ),
    "slope_32": Tolerance(
        5e-3, "a central difference of float32 losses at steps of 0.02, of the largest slope: u32 "
        "L sqrt(n) / h = 1e-4 and h^2 / 6 of the third derivative; measured 5e-4",
        "the labels of the model, another text",
    ),
    "regmean": Tolerance(
        1e-6, "float64 but for A' in float32: |B| u |A'| summed over R <= 128, u sqrt(R) = 7e-7 of "
        "the delta where factors do not cancel; measured 3e-8", "one weight off by a thousandth",
    ),
    "pruned atoms": Tolerance(
        1e-6, "of the largest atom: factors in float32, u sqrt(R) = 3e-7 at R = 20, and a ridge of "
        "1e-10 that weights feel times kappa^2 < 1e3", "one weight off by a thousandth",
    ),
    "regmean float32": Tolerance(
        5e-5, "K = I + Z Z^T, |K^-1 Z| <= 1/2: a quarter of |dK|, with dK random of about "
        "2 u sqrt(T) K_tt = 1e-4 at T = 2048, K_tt = 19; measured 4e-6 to 1.3e-5",
        "the samples rounded once more to bfloat16 (1e-3 to 1e-2)",
    ),
    "resamples": Tolerance(
        1e-12, "means of some hundred float64 below 10 in another order: n u64 10 = 2e-13",
        "one item drawn once more",
    ),
    "bootstrap": Tolerance(
        0.14, "relative: the standard deviation of R = 1000 draws is off by 1/sqrt(2 R), 6 times",
        "items of one key drawn apart: half or less of the error",
    ),
    "autograd": Tolerance(
        1e-5, "of |g|: some 40 roundings in a row, forward and backward through 2 layers in "
        "float32, that add up like their root, and cancellation over tokens by up to 20: "
        "20 sqrt(40) u; measured 9e-7",
        "another step's gradient, clipped ones, one micro-batch for all, G without its projector",
    ),
    "autograd bf16": Tolerance(
        0.15, "the same with u = 2^-9 of bfloat16, cancellation by up to 10; measured 0.03",
        "another step's gradient",
    ),
}  # fmt: skip


def bound(name: str) -> float:
    """The value of a table entry."""
    return TOLERANCES[name].value
