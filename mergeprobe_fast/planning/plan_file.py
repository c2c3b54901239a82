"""plan.json: what a plan says, for programs and for ``apply``; read as strictly as can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergeprobe_fast
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.json_fields import (
    count,
    fields,
    flag,
    hexadecimal,
    many,
    named,
    natural,
    not_negative,
    nullable,
    number,
    of_format,
    text,
)
from mergeprobe_fast.io.strict_json import Bad
from mergeprobe_fast.merging import MERGE_METHODS
from mergeprobe_fast.planning.costs import Costs
from mergeprobe_fast.planning.plan_types import ACTIONS, Group

if TYPE_CHECKING:
    from mergeprobe_fast.planning.result import Plan

PLAN_NAME = "plan.json"
FORMAT, VERSION = "mergeprobe-plan", 2
_SLACK = 1e-6  # of a cost that is written and one that is added up


def to_json(plan: Plan) -> dict[str, Any]:
    """The object to write; ``parse`` gives it back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tool": f"mergeprobe_fast {mergeprobe_fast.__version__}",
        "base_model": plan.base_model,
        "calibration": plan.calibration,
        "predictor": {
            "level": plan.level, "calibrated": plan.calibrated, "coverage": plan.coverage,
            "reason": plan.reason, "early": plan.early,
        },
        "adapters": [asdict(a) for a in plan.adapters],
        "costs": plan.costs.as_json(),
        "actions": list(plan.actions),
        "groups": [_group_json(g) for g in plan.groups],
        "resident": plan.resident,
        "highest_floor": plan.highest,
        "cost": plan.cost,
        "routed_cost": plan.routed_cost,
        "one_sum": None if plan.one_sum is None else asdict(plan.one_sum),
        "proven": plan.proven,
        "decided": plan.decided,
        "judged": dict(plan.judged),
        "curve": [asdict(o) for o in plan.curve],
        "notes": list(plan.notes),
    }  # fmt: skip


def to_text(plan: Plan) -> str:
    """The file; the same for the same plan."""
    return json.dumps(to_json(plan), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> Plan:
    """A plan from its file; InputError naming file, key and reason."""
    raw = strict_json.read(path)
    try:
        return parse(raw)
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None


def parse(raw: dict[str, Any]) -> Plan:
    """The plan of an object; ``Bad`` for anything wrong."""
    from mergeprobe_fast.planning.result import Outcome, Plan, PlannedAdapter

    of_format(raw, FORMAT, VERSION)
    said = fields(
        raw, "", format=text, version=count, tool=text, base_model=nullable(text),
        calibration=nullable(text), predictor=_predictor, adapters=many(_adapter), costs=_costs,
        actions=many(_action), groups=many(_group), resident=nullable(count), highest_floor=flag,
        cost=not_negative, routed_cost=not_negative,
        one_sum=nullable(_outcome), proven=flag, decided=flag, judged=named(natural),
        curve=many(_outcome), notes=many(_any_text),
    )  # fmt: skip
    adapters = tuple(PlannedAdapter(**a) for a in said["adapters"])
    _check_members([a.name for a in adapters], said["groups"])
    if said["resident"] is not None and len(said["groups"]) > max(1, said["resident"]):
        raise Bad(f"is {said['resident']}, and there are {len(said['groups'])} groups", "resident")
    if said["highest_floor"] and said["resident"] is None:
        raise Bad("is true, and nothing limits the groups", "highest_floor")
    total = sum(g.cost for g in said["groups"])
    if abs(total - said["cost"]) > _SLACK * max(1.0, total):
        raise Bad(f"is {said['cost']!r}, and the groups cost {total!r}", "cost")
    predictor = said["predictor"]
    return Plan(
        adapters=adapters, base_model=said["base_model"], calibration=said["calibration"],
        costs=said["costs"], actions=said["actions"], groups=said["groups"], cost=said["cost"],
        routed_cost=said["routed_cost"],
        one_sum=None if said["one_sum"] is None else Outcome(**said["one_sum"]),
        level=predictor["level"], calibrated=predictor["calibrated"],
        coverage=predictor["coverage"], reason=predictor["reason"], early=predictor["early"],
        proven=said["proven"], decided=said["decided"], judged=said["judged"],
        notes=said["notes"], resident=said["resident"], highest=said["highest_floor"],
        curve=tuple(Outcome(**o) for o in said["curve"]),
    )  # fmt: skip


def _group_json(g: Group) -> dict[str, Any]:
    return {
        "name": g.name, "members": list(g.members), "action": g.action, "method": g.method,
        "weights": None if g.weights is None else list(g.weights),
        "arguments": dict(g.arguments), "retention": list(g.retention), "low": list(g.low),
        "high": list(g.high), "cost": g.cost, "reasons": list(g.reasons),
    }  # fmt: skip


def _check_members(names: list[str], groups: tuple[Group, ...]) -> None:
    """Every adapter is in one group, and names of groups differ."""
    if len(set(names)) != len(names):
        raise Bad("has a name twice", "adapters")
    left, labels = set(names), set()
    for k, group in enumerate(groups):
        if group.name in labels:
            raise Bad(f"{group.name!r} is another group's", f"groups[{k}].name")
        labels.add(group.name)
        for member in group.members:
            if member not in left:
                why = "is in two groups" if member in names else "is no adapter of the plan"
                raise Bad(f"{strict_json.printable(member)!r} {why}", f"groups[{k}].members")
            left.remove(member)
    if left:
        raise Bad(f"{strict_json.printable(min(left))!r} is in none", "groups")


def _predictor(value: Any, where: str) -> dict[str, Any]:
    return fields(value, where, level=text, calibrated=flag, coverage=nullable(not_negative),
                  reason=_any_text, early=flag)  # fmt: skip


def _adapter(value: Any, where: str) -> dict[str, Any]:
    return fields(value, where, name=text, path=text, domain=nullable(text),
                  fingerprint=nullable(hexadecimal(64)))  # fmt: skip


def _outcome(value: Any, where: str) -> dict[str, Any]:
    return fields(value, where, resident=natural, cost=not_negative, average=number, worst=number,
                  floor=not_negative, allowed=flag)  # fmt: skip


def _action(value: Any, where: str) -> str:
    if value not in ACTIONS:
        raise Bad(f"is none of {', '.join(ACTIONS)}", where)
    return value


def _any_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Bad("is not a text", where)
    return value


def _costs(value: Any, where: str) -> Costs:
    said = fields(
        value, where, adapter=not_negative, request=not_negative, average=not_negative,
        worst=not_negative, floor=not_negative, floor_on=text, traffic=named(not_negative),
    )  # fmt: skip
    try:
        return Costs(**said)
    except InputError as error:
        raise Bad(error.reason, where) from None


def _group(value: Any, where: str) -> Group:
    numbers = many(nullable(number))
    said = fields(
        value, where, name=text, members=many(text, 1), action=_action, method=nullable(text),
        weights=nullable(many(number)), arguments=_arguments, retention=numbers, low=numbers,
        high=numbers, cost=not_negative, reasons=many(_any_text),
    )  # fmt: skip
    size = len(said["members"])
    for key in ("weights", "retention", "low", "high"):
        if said[key] is not None and len(said[key]) != size:
            raise Bad(f"has {len(said[key])} numbers for {size} members", f"{where}.{key}")
    if said["action"] == "route":
        if size > 1:
            raise Bad(f"{size} adapters that stay as they are", f"{where}.members")
        if said["method"] is not None or said["weights"] is not None or said["arguments"]:
            raise Bad("nothing is merged here", f"{where}.method")
    elif size < 2:
        raise Bad("one adapter to merge", f"{where}.members")
    elif said["method"] not in MERGE_METHODS:
        raise Bad("is no merge method", f"{where}.method")
    return Group(**said)


def _arguments(value: Any, where: str) -> Mapping[str, Any]:
    return named(lambda item, _: item)(value, where)
