"""Whether adapters are still those that a plan was made of."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.planning.result import PlannedAdapter


def fingerprints(zoo: Zoo, threads: int | None = None) -> list[str]:
    """``io.fingerprint`` of every adapter; reads them all. InputError for a file that changed."""
    with ThreadPoolExecutor(_env.threads_or_default(threads)) as pool:  # hashing holds no lock
        return list(pool.map(fingerprint, zoo))


def check_unchanged(
    adapters: Sequence[PlannedAdapter], zoo: Zoo, threads: int | None = None
) -> None:
    """Refuse a zoo whose adapters are not those of a plan, by their fingerprints.

    A plan that knows none of an adapter, made of no files, does not check it.

    Raises:
        InputError: naming the first adapter that changed since the plan was made.
    """
    known = {a.name: a.fingerprint for a in adapters if a.fingerprint is not None}
    there = [a for a in zoo if a.name in known]
    if not there:
        return
    for a, found in zip(there, fingerprints(Zoo(there, same_base=True), threads), strict=True):
        if found != known[a.name]:
            reason = "changed since the plan was made, or is another adapter: plan again"
            raise InputError(reason, path=a.path, key=a.name)
