"""From predicted retention to a plan: decide for sets, plan whole zoos, carry it out."""

from mergeprobe_fast.planning.artefacts import apply_plan
from mergeprobe_fast.planning.costs import Costs, load_costs
from mergeprobe_fast.planning.decision import Decision, decide
from mergeprobe_fast.planning.judging import Judge, Judged
from mergeprobe_fast.planning.plan_types import ACTIONS, Group
from mergeprobe_fast.planning.planner import Partition, partition
from mergeprobe_fast.planning.result import Plan
from mergeprobe_fast.planning.zoo_plan import make_plan, plan

__all__ = [
    "ACTIONS",
    "Costs",
    "Decision",
    "Group",
    "Judge",
    "Judged",
    "Partition",
    "Plan",
    "apply_plan",
    "decide",
    "load_costs",
    "make_plan",
    "partition",
    "plan",
]
