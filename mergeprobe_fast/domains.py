"""Which calibration domain an adapter belongs to, by its name or as the caller says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergeprobe_fast.errors import InputError


def assign_domains(
    names: Sequence[str],
    domains: Sequence[str],
    given: Mapping[str, str] | Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The calibration domain of every adapter.

    ``given`` names them, in order or by adapter name. Otherwise an adapter called like a domain, or
    whose name starts with one and a separator (math-a, math_v2, code.r4), belongs to it.

    Raises:
        InputError: a domain that is not in the calibration, an adapter without one or with several.
    """
    if given is not None and not isinstance(given, Mapping):
        if isinstance(given, str) or len(given) != len(names):
            raise InputError(f"expected one for each of {len(names)} adapters", key="domains")
        given = dict(zip(names, given, strict=True))
    chosen = dict(given or {})
    for name, domain in chosen.items():
        if name not in names:
            raise InputError(f"names {name!r}, which is no adapter here", key="domains")
        if domain not in domains:
            known = ", ".join(domains)
            raise InputError(f"{name}: no domain {domain!r} in the calibration, which has {known}",
                             key="domains")  # fmt: skip
    return tuple(chosen.get(name) or _domain_of(name, domains) for name in names)


def _domain_of(name: str, domains: Sequence[str]) -> str:
    stem = name.replace("\\", "/").rsplit("/", 1)[-1].lower()
    fits = [d for d in domains if stem == d.lower()]
    if not fits:
        fits = [d for d in domains if stem.startswith(tuple(d.lower() + c for c in "-_. "))]
        longest = max(map(len, fits), default=0)
        fits = [d for d in fits if len(d) == longest]
    if len(fits) != 1:
        reason = (
            f"cannot tell the calibration domain of {name!r}; say it (--domain {name}=DOMAIN); "
            f"there are: {', '.join(domains)}"
        )
        raise InputError(reason, key="domains")
    return fits[0]
