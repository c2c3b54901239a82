"""What ``plan --apply`` writes: adapters that load as they are, their list, vLLM's line, a router.

    adapters/<name>/      a PEFT folder for each resident adapter
    adapters.json         which of them answers for which original (``planning.served``)
    vllm.sh               starts vLLM with all of them
    router.json, router.safetensors    which of them answers a request (``io.router_file``)

Adapters that stay as they are get copied, not linked or named by their path: the folder can be
moved to where it is served, and training on does not change what is served from it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mergeprobe_fast.domains import assign_domains
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.atomic import AtomicFolder
from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.io.router_file import ROUTER_NAME, ROUTER_TENSORS, write_router
from mergeprobe_fast.merging import MERGE_METHODS
from mergeprobe_fast.merging.merge import open_given
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.planning import vllm
from mergeprobe_fast.planning.plan_types import Group
from mergeprobe_fast.planning.resident import folder_name, kept_of, resident_name, write_resident
from mergeprobe_fast.planning.routing import Requests, answers_of, build_router
from mergeprobe_fast.planning.served import (
    ADAPTERS_FOLDER,
    SCRIPT_NAME,
    SERVED_NAME,
    Resident,
    Served,
    write_served,
)
from mergeprobe_fast.planning.unchanged import check_unchanged
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

_ANY_METHOD = ("rank", "energy")  # arguments of every merge
CONTENTS = (ADAPTERS_FOLDER, SERVED_NAME, SCRIPT_NAME, ROUTER_NAME, ROUTER_TENSORS)


class HasGroups(Protocol):
    """What is needed of a plan; where ``calibrated`` is said to be False, it is passed on."""

    @property
    def groups(self) -> Sequence[Group]: ...


def apply_plan(
    plan: HasGroups,
    zoo: Zoo,
    folder: str | os.PathLike[str],
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    domains: Mapping[str, str] | Sequence[str] | None = None,
    max_rank: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: Any = "cpu",
) -> Served:
    """Write everything that a plan decides, as a folder that appears whole or not at all.

    Adapters that stay as they are get copied byte for byte. Where PEFT or vLLM would not read one
    so (several scales, shards, one file of another tool), it is written anew with its scale in B.

    Args:
        zoo: of which the plan is; every adapter is in one group.
        calibration, domains: as of :func:`mergeprobe_fast.merge`; for methods that learn from
            data, and for the router.
        max_rank: adapters of a higher rank are cut to it; what that costs is in their report, and
            no retention is claimed for them: the plan is of whole ones. vLLM takes 512 at most, and
            memory for the highest rank of all.
        progress: called with the number of groups done since the last call; one more at the end,
            for the router.
        device: "cpu", "cuda", "cuda:1" or "auto", as :func:`mergeprobe_fast.pair_features` has it.

    Returns:
        What ``adapters.json`` says; its ``vllm_command`` starts vLLM on ``folder``.

    Raises:
        InputError: ``folder`` exists (without ``overwrite``) or cannot be written, a plan of no
            or other adapters, an adapter that changed since the plan was made, a merge that is
            refused, adapters that PEFT has no names for.
        BackendError: the device cannot be used here.
    """
    there = open_device(device)
    groups = tuple(plan.groups)
    folders = _check(groups, zoo, max_rank)
    check_unchanged(getattr(plan, "adapters", ()), zoo, threads)
    opened = open_given(calibration)
    if opened is None and domains is not None:
        raise InputError("given without a calibration", key="domains")
    belongs = () if opened is None else assign_domains(zoo.names, list(opened.domains), domains)
    out = AtomicFolder(folder, overwrite, inputs=[a.path for a in zoo], contents=CONTENTS)
    with out as temporary:
        residents, by_name = [], {a.name: a for a in zoo}
        for group, name in zip(groups, folders, strict=True):
            members = [by_name[member] for member in group.members]
            given = _given(group, opened, belongs, zoo)
            residents.append(write_resident(
                group, members, temporary, name, {**given, "device": there}, max_rank, threads
            ))  # fmt: skip
            if progress:
                progress(1)
        written = [open_adapter(temporary / r.folder, name=r.name) for r in residents]
        resident_zoo = Zoo(written, same_base=True)
        requests = None
        if opened is not None:
            kept = {m: r for g in groups for m, r in zip(g.members, kept_of(g), strict=True)}
            held = {r.name: [m.name for m in r.members] for r in residents}
            requests = Requests(opened, answers_of(zoo, belongs, held, kept))
        with computing_on(there):
            info, tensors = build_router(resident_zoo, requests, threads=threads)
        write_router(temporary, info, tensors)
        calibrated = getattr(plan, "calibrated", True)
        notes = [*_notes(residents, written, max_rank, calibrated),
                 *(f"router: {note}" for note in info.notes)]  # fmt: skip
        served = Served(out.out, zoo.base_model, tuple(residents), tuple(notes))
        write_served(temporary, served)
        if progress:
            progress(1)
    return served


def _check(groups: Sequence[Group], zoo: Zoo, max_rank: int | None) -> list[str]:
    """Refuse what cannot be written; the folder of every group, relative."""
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise InputError(f"must be a positive integer, got {max_rank!r}", key="max_rank")
    if not groups:
        raise InputError("has no adapters", key="plan")
    left = dict.fromkeys(zoo.names)
    for name in (member for group in groups for member in group.members):
        if name not in left:
            known = name in zoo.names
            reason = "the plan has it twice" if known else "the plan names it, and the zoo has none"
            raise InputError(reason, key=name)
        del left[name]
    if left:
        raise InputError("is in no group of the plan", key=next(iter(left)))
    odd = next((a for a in zoo if a.config.get("naming", "path") != "path"), None)
    if odd is not None:
        reason = f"is a {odd.format} file: PEFT and vLLM have other names for its modules"
        raise InputError(reason, path=odd.path)
    for group in groups:
        if not group.members or (not group.merged and len(group.members) > 1):
            raise InputError(f"{len(group.members)} adapters to {group.action}", key=group.name)
        if group.merged and group.method not in MERGE_METHODS:
            raise InputError(f"no merge method {group.method!r}", key=group.name)
        for name in group.arguments:  # a file may hold any; these are apply's own
            if group.merged and name not in {*_ANY_METHOD, *MERGE_METHODS[group.method].arguments}:
                raise InputError(f"{group.method} takes no argument {name!r}", key=group.name)
    names = [resident_name(group) for group in groups]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError("two resident adapters of this name", key=name)
    taken: set[str] = set()
    return [f"{ADAPTERS_FOLDER}/{folder_name(name, taken)}" for name in names]


def _given(
    group: Group, calibration: Calibration | None, domains: Sequence[str], zoo: Zoo
) -> dict[str, Any]:
    """The calibration and domains of a group whose method learns from data, else nothing."""
    if not group.merged or not MERGE_METHODS[group.method].data:
        return {}
    if calibration is None:
        return {"calibration": None}  # merge says what it needs one for
    domain_of = dict(zip(zoo.names, domains, strict=True))
    return {"calibration": calibration, "domains": [domain_of[m] for m in group.members]}


def _notes(
    residents: Sequence[Resident], written: Sequence[AdapterRef], max_rank: int | None,
    calibrated: bool,
) -> list[str]:  # fmt: skip
    """What somebody who serves the folder should know."""
    notes = []
    if not calibrated and any(r.action != "route" for r in residents):
        notes.append("what is said to be retained is an uncalibrated score: it ranks, and is no "
                     "measured retention")  # fmt: skip
    largest = vllm.RANKS[-1]
    for r, adapter in zip(residents, written, strict=True):
        if r.arguments.get("rank") == max_rank is not None:
            notes.append(f"{r.name} was cut to rank {max_rank}, which leaves out "
                         f"{100 * r.truncation_error:.2g} % of its norm: its retention was "
                         "predicted uncut, and is not claimed")  # fmt: skip
        if r.rank > largest:
            notes.append(f"{r.name} has rank {r.rank}, and vLLM takes {largest} at most: apply the "
                         f"plan with a max_rank of {largest} to cut it")  # fmt: skip
        kinds = sorted({m.kind for m in adapter.modules.values()} - {"linear"})
        if kinds:
            notes.append(f"{r.name} changes modules that vLLM may refuse: {', '.join(kinds)}")
        if r.action == "route" and r.method is not None:
            notes.append(f"{r.name} was written anew: vLLM reads one file, and one scale for all "
                         "modules")  # fmt: skip
    return notes
