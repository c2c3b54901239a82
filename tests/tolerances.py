"""Every tolerance of the numeric tests, derived, in one table, each with what must break it.

u is the unit roundoff (2^-24 or 2^-53). Sums of n terms err by at most n u, and by about sqrt(n) u
where roundings are independent (Higham and Mary 2019): lambda sqrt(n) u with lambda = 3 is exceeded
once in a thousand for one entry in theory, and measured errors are 0.05 to 0.6 sqrt(n) u.
Errors are componentwise, relative to the same sum over absolute values, so a bound does not
loosen where terms cancel. A planted fault per entry (``fault``) is what the tests show to exceed it.
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


TOLERANCES = {
    "cosine": Tolerance(
        5e-7, "the project's promise for float32 accumulation; measured 2e-9 at N = 200",
        "the R x R Grams kept in bf16 (2e-4, CATALOGUE 10)",
    ),
    "exact_algebra": Tolerance(
        1e-11, "float64 on both sides, orthogonal or well conditioned (kappa < 1e2) transforms: "
        "kappa^2 sqrt(d) u with d <= 1000", "the inverse of the gauge left out",
    ),
    "sigma": Tolerance(
        1e-12, "of ||sB||_F ||A||_F: float64 throughout; Cholesky of an equilibrated Gram is "
        "backward stable to n^1.5 u, n <= 128", "one scale off by 1e-10",
    ),
    "dependent": Tolerance(
        2e-6, "of ||sB||_F ||A||_F: rows closer than 1e-7 sqrt(n) to the span of the others are "
        "dropped (the rounding of float32 factors), and sigma below the rank rule",
        "the weakest component above the rule dropped",
    ),
    "orthonormal": Tolerance(
        1e-8, "first Cholesky loses u kappa^2, repaired above kappa = 1e3 (estimated by the pivots, "
        "which may be sqrt(n) low): u * 1e6 * n, n <= 64", "one row off by 1e-7",
    ),
    "projector": Tolerance(
        1e-9, "well conditioned and gapped: 10 u ||W|| kappa / gap with gap >= 1e-2, kappa <= 1e2",
        "one vector swapped with the first one left out",
    ),
    "feature": Tolerance(
        3e-5, "of the feature's range: canonical factors are rounded to float32 (u32), products "
        "summed over d and r^2 in float32 (LAMBDA sqrt(d) u32), ratios of such sums near rank "
        "changes amplify by the rank", "bf16 canonical factors (4e-3)",
    ),
    "spectrum": Tolerance(
        1e-10, "singular values are float64 from exact float32 factors; ratios of them",
        "sigma^2 normalised instead of sigma in the effective rank",
    ),
    "gauge": Tolerance(
        5e-5, "the gauge-transformed factors are rounded to float32: kappa(M) u32 with kappa <= 30, "
        "plus 'feature' on both sides", "a feature of the factors themselves: |B| / |A|",
    ),
}  # fmt: skip


def bound(name: str) -> float:
    """The value of a table entry."""
    return TOLERANCES[name].value
