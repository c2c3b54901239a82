"""Five domains of questions with checks: math, code, science, instruct and safety."""

from mergeprobe_fast.merge_peft.tasks.build import DOMAINS, TASKS, build
from mergeprobe_fast.merge_peft.tasks.check import candidate, check, check_many
from mergeprobe_fast.merge_peft.tasks.item import END_OF_TURN, KINDS, Item, Kind, chat, closed
from mergeprobe_fast.merge_peft.tasks.words import SPLITS, Split

__all__ = [
    "DOMAINS",
    "END_OF_TURN",
    "KINDS",
    "SPLITS",
    "TASKS",
    "Item",
    "Kind",
    "Split",
    "build",
    "candidate",
    "chat",
    "check",
    "check_many",
    "closed",
]
