"""What to do with one set of adapters: by its cost, or by the deterministic rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning.book import Book
from mergeprobe_fast.planning.costs import Costs
from mergeprobe_fast.planning.judging import Judge
from mergeprobe_fast.planning.plan_types import ACTIONS, CHEAP, COSTLY
from mergeprobe_fast.planning.planner import check_actions
from mergeprobe_fast.planning.verdict import Verdict
from mergeprobe_fast.planning.words import list_of, refusal, share

RULES = ("cost", "deterministic")


@dataclass(frozen=True, eq=False)
class Decision:
    """What to do with some adapters.

    ``action`` is for ``members``; ``routed`` stay as they are. Arrays are (members,), empty where
    nothing is merged; ``weights`` is NaN for rules that have none. ``decided`` is False where the
    judge abstains from every action, so that keeping all is no finding.
    """

    action: str
    members: tuple[int, ...]
    routed: tuple[int, ...]
    weights: np.ndarray
    retention: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reasons: tuple[str, ...]
    decided: bool = True


def decide(
    judge: Judge,
    members: Sequence[int],
    costs: Costs | None = None,
    *,
    names: Sequence[str],
    actions: Sequence[str] = ACTIONS,
    rule: str = "cost",
) -> Decision:
    """Merge, reweight, prune, merge by data (RegMean) or route: for these ``members`` as one set.

    ``rule="cost"`` takes the cheapest action that keeps to the floor, or keeps every adapter where
    that is cheaper. ``rule="deterministic"`` (CATALOGUE section 5, the baseline) takes the first,
    in that order, which leaves every member at the floor; where none does, the member with the
    least retention, adjusted by leverage, is routed and the rest is looked at again. With
    :class:`.ErrorJudge` that is the rule on E6, E7 and E8, E9 and RegMean errors, without a
    predictor. What is adjusted: ``1 - v_i e_i`` with ``e_i`` = 1 - retention of the plain merge and
    ``v_i`` = 1 - leverage, the part of the member that no combination of the others replaces (1
    where the judge knows no leverage).

    Args:
        members: indices of ``names``, the zoo.

    Raises:
        InputError: no such rule or action, a member twice, or one that does not exist.
    """
    costs = costs or Costs()
    check_actions(actions)
    if rule not in RULES:
        raise InputError(f"no rule {rule!r}; there are: {', '.join(RULES)}", key="rule")
    chosen = tuple(sorted(int(i) for i in members))
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= len(names):
        raise InputError(f"expected different indices of {len(names)} adapters", key="members")
    order = np.arange(len(names), dtype=np.int32)
    book = Book(judge, costs, order, costs.shares(names), actions, costly=2 * len(names))
    decided = _by_cost if rule == "cost" else _by_rule
    return decided(book, chosen, list(names))


def _by_cost(book: Book, members: tuple[int, ...], names: list[str]) -> Decision:
    if len(members) == 1:
        return _kept(members, ("a single adapter",))
    book.ask([members], book.cheap)
    if book.bound(members) < book.price(members):
        book.ask([members], book.costly)
    best, alone = book.best(members), book.total([(i,) for i in members])
    reasons = [refusal(v, book, [names[i] for i in members])
               for v in book.verdicts(members) if not v.allowed]  # fmt: skip
    reasons += unavailable(book)
    if best is not None and best.price < alone:
        return _merged(best, members, (), tuple(reasons))
    if best is not None:
        reasons.insert(0, f"{best.action} would keep to the floor, but costs more than it saves")
    return _kept(members, tuple(reasons), _decided(book, members))


def _by_rule(book: Book, members: tuple[int, ...], names: list[str]) -> Decision:
    rest, routed, reasons = members, [], []
    decided = True
    while len(rest) > 1:
        for action in (*CHEAP, *COSTLY):
            if action not in book.asked:
                continue
            book.ask([rest], [action])
            verdict = book.verdict(rest, action)
            if verdict.allowed:
                return _merged(verdict, rest, tuple(routed), (*reasons, *unavailable(book)))
            reasons.append(refusal(verdict, book, [names[i] for i in rest]))
        decided = decided and _decided(book, rest)
        out = rest[int(np.argmin(_adjusted(book, rest)))]
        reasons.append(f"{names[out]} has the least retention, adjusted by leverage: routed")
        routed.append(out)
        rest = tuple(i for i in rest if i != out)
    return _kept(members, (*reasons, *unavailable(book)), decided)


def _adjusted(book: Book, members: tuple[int, ...]) -> np.ndarray:
    first = next(iter(book.verdicts(members)), None)
    lost = np.ones(len(members)) if first is None else first.lost
    leverage = getattr(book.judge, "leverage", None)
    own = np.ones(len(members)) if leverage is None else 1 - np.nan_to_num(leverage(members))
    return 1 - own * lost


def _decided(book: Book, members: tuple[int, ...]) -> bool:
    return any(v.known or v.allowed for v in book.verdicts(members))


def unavailable(book: Book) -> list[str]:
    """The actions that cannot be judged, in words."""
    missing: dict[str, list[str]] = {}
    for action, what in book.judge.unavailable.items():
        missing.setdefault(what, []).append(action)
    return [f"{list_of(actions)}: not available without {what}"
            for what, actions in missing.items()]  # fmt: skip


def refusals(book: Book, names: Sequence[str]) -> list[str]:
    """The merges that could not be made, in words; ``names`` in the order of the zoo."""
    by_action: dict[str, list[tuple[frozenset[int], str]]] = {}
    for (action, members), why in book.refused.items():
        by_action.setdefault(action, []).append((members, why))
    said = []
    for action, found in by_action.items():
        members, why = min(found, key=lambda f: (len(f[0]), sorted(f[0])))
        which = list_of([names[i] for i in sorted(members)])
        count = "1 set" if len(found) == 1 else f"{len(found)} sets, say"
        said.append(f"{action}: not available for {count} ({which}): {why}")
    return said


def _merged(
    verdict: Verdict, members: tuple[int, ...], routed: tuple[int, ...], reasons: tuple[str, ...]
) -> Decision:
    kept = f"{verdict.action} leaves every member at least {share(verdict.worst)}"
    return Decision(verdict.action, members, routed, verdict.weights, verdict.retention,
                    verdict.low, verdict.high, (kept, *reasons))  # fmt: skip


def _kept(members: tuple[int, ...], reasons: tuple[str, ...], decided: bool = True) -> Decision:
    none = np.zeros(0)
    return Decision("route", (), members, none, none, none, none, reasons, decided)
