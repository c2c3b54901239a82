"""All statistics of sets of adapters, by group. See :mod:`.set_declare` for what that is."""

from __future__ import annotations

from collections.abc import Sequence

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features import set_atoms, set_grams, set_loss, set_spans
from mergeprobe_fast.features.set_declare import SetFeature, SetGroup, SetRequest
from mergeprobe_fast.recorded import NOTHING, Recorded

SET_GROUPS: tuple[SetGroup, ...] = (
    *set_grams.GROUPS, *set_loss.GROUPS, *set_spans.GROUPS, *set_atoms.GROUPS,
)  # fmt: skip
_GROUP_OF = {f.name: group for group in SET_GROUPS for f in group.features if not f.per_member}
SET_FEATURES: dict[str, SetFeature] = {
    f.name: f for group in SET_GROUPS for f in group.features if not f.per_member
}

__all__ = ["SET_FEATURES", "SET_GROUPS", "SetFeature", "SetGroup", "SetRequest", "select_sets"]


def select_sets(
    features: str | Sequence[str], recorded: Recorded = NOTHING
) -> list[tuple[SetGroup, list[SetFeature]]]:
    """The groups to compute and the columns wanted of each, for "default", "all" or names.

    "default" and "all" take what can be computed from what was recorded; "default" leaves out the
    groups that work set by set. InputError for a name that does not exist, that is there twice, or
    that needs what is missing.
    """
    if features in ("default", "all"):
        chosen = [
            name for name, group in _GROUP_OF.items()
            if group.missing(recorded) is None and (group.default or features == "all")
        ]  # fmt: skip
    else:
        chosen = [features] if isinstance(features, str) else list(features)
    for name in chosen:
        if name not in _GROUP_OF:
            raise InputError(f"no set feature {name!r}; there are: {', '.join(_GROUP_OF)}",
                             key="features")  # fmt: skip
        missing = _GROUP_OF[name].missing(recorded)
        if missing is not None:
            raise InputError(f"{name} needs {missing}", key="features")
    if len(set(chosen)) != len(chosen):
        raise InputError("a feature is named twice", key="features")
    groups = {group.name: group for group in SET_GROUPS}
    wanted: dict[str, list[SetFeature]] = {}
    for name in chosen:
        wanted.setdefault(_GROUP_OF[name].name, []).append(SET_FEATURES[name])
    return [(groups[name], columns) for name, columns in wanted.items()]
