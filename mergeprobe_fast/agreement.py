"""Whether adapters belong together: the base models they declare, the names of their modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.adapter import AdapterRef
from mergeprobe_fast.io.single_file import MERGE_KEY

_NAMINGS = {
    "path": "module paths, as PEFT has them",
    "kohya": "kohya's underscore names",
    "diffusers": "diffusers' names (unet., transformer., text_encoder., ...)",
    "diffusion_model": "ComfyUI's names (diffusion_model.)",
}


def is_merged(adapter: AdapterRef) -> bool:
    """Whether a merge of ours wrote it."""
    if adapter.format == "peft":
        return (adapter.path / "merge.json").is_file()
    return MERGE_KEY in adapter.config["metadata"]


def common_naming(adapters: Sequence[AdapterRef]) -> None:
    """Refuse formats whose module names cannot be matched: nothing would be shared."""
    groups: dict[str, list[AdapterRef]] = {}
    for a in adapters:
        groups.setdefault("path" if a.format == "peft" else a.config["naming"], []).append(a)
    if len(groups) < 2:
        return
    usual = max(groups, key=lambda name: len(groups[name]))
    odd = next(name for name in groups if name != usual)
    listed = []
    for name, members in groups.items():
        shown = ", ".join(a.name for a in members[:3]) + (" ..." if len(members) > 3 else "")
        listed.append(f"{_NAMINGS[name]} ({len(members)}: {shown})")
    raise InputError(
        f"its modules cannot be matched with the others': {'; '.join(listed)}; "
        "give adapters of one kind",
        path=groups[odd][0].path,
    )


def strangers(adapters: Sequence[AdapterRef]) -> list[str]:
    """A note when single files fall into groups that share no module: other names, other models."""
    if all(a.format == "peft" for a in adapters):
        return []
    parts: list[tuple[set[str], list[str]]] = []
    alike: dict[int, tuple[frozenset[str], list[str]]] = {}  # adapters of one recipe
    for a in adapters:
        plan = id(getattr(a.modules, "plan", a.modules))
        if plan not in alike:
            alike[plan] = frozenset(a.modules), []
        alike[plan][1].append(a.name)
    for modules, names in alike.values():
        together = [part for part in parts if not part[0].isdisjoint(modules)]
        parts = [part for part in parts if part[0].isdisjoint(modules)]
        merged = set(modules).union(*(part[0] for part in together))
        parts.append((merged, [n for part in together for n in part[1]] + names))
    if len(parts) < 2:
        return []
    shown = " | ".join(", ".join(p[1][:3]) + (" ..." if len(p[1]) > 3 else "") for p in parts[:4])
    return [f"{len(parts)} groups of adapters share no module (another naming or model?): {shown}"]


def common_base(adapters: Sequence[AdapterRef], same: bool) -> tuple[str | None, list[str]]:
    """The base model that all declare, and notes; InputError when they declare two."""
    declared = Counter(a.base_model for a in adapters if a.base_model is not None)
    silent = [a.name for a in adapters if a.base_model is None]
    if len(declared) > 1 and not same:
        usual, _ = declared.most_common(1)[0]
        odd = next(a for a in adapters if a.base_model not in (None, usual))
        other = next(a for a in adapters if a.base_model == usual)
        raise InputError(
            f"declares base model {odd.base_model!r}, but {other.name!r} declares {usual!r}; "
            "if they are the same model, pass --same-base",
            path=odd.path,
        )
    notes = []
    if len(declared) > 1:
        notes.append(f"taken as one base model: {', '.join(sorted(declared))}")
    if silent:
        shown = ", ".join(silent[:3]) + (" ..." if len(silent) > 3 else "")
        notes.append(f"no base model declared, taken to fit ({len(silent)}): {shown}")
    return next(iter(declared), None), notes
