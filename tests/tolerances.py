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
        2e-14, "of ||sB||_F ||A||_F: n u with n = 128; float64 throughout, Cholesky of an "
        "equilibrated Gram is backward stable; measured 1e-15", "sigma off by 1e-10",
    ),
    "orthonormal": Tolerance(
        1e-8, "the first Cholesky loses u kappa^2 and is repaired above kappa = 1e3 as its pivots "
        "estimate it, up to sqrt(n) low: u * 1e6 * 128; measured 1e-9", "rows 1e-7 too long",
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
    "spectrum": Tolerance(
        1e-10, "singular values are float64 from exact float32 factors; ratios of them",
        "sigma^2 normalised instead of sigma in the effective rank",
    ),
    "gauge": Tolerance(
        1e-5, "moved factors are rounded to float32 again: kappa(M) sqrt(r) u32, kappa = 5, and "
        "'feature' on both sides", "a norm of the factors themselves",
    ),
}  # fmt: skip


def bound(name: str) -> float:
    """The value of a table entry."""
    return TOLERANCES[name].value
