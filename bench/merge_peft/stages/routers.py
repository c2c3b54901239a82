"""Routers: several adapters stay resident, and each prompt is answered by one of them.

The upper end of the operator table, and what it costs. A router learns from other prompts of the
members' exams, never from a test item, and chooses one of these exams for every test prompt; the
member that was trained for it answers.

- oracle routing: every item by its own adapter.
- learned router: logistic regression on the hidden states that enter the lowest adapted layer, the
  mean over the prompt's tokens and the last one. The layers below are frozen, so that the states
  are there before any adapter is needed. It learns from the calibration prompts, as operators do,
  and these are worded otherwise than the test.
- learned router, training prompts: the same, from as many prompts of the split train: what it gets
  when it knows the wording.
- centroid router: the nearest mean of the states of the calibration prompts.
- token router: naive Bayes on the tokens of the calibration prompts, no hidden states.

What a router's choice scores is looked up: no pass is made but for pairs of an adapter and an exam
that it confuses (:func:`needed`). One line of the journal is one exam of one set:

    {"kind": "routed", "key": "learned router(a+b)", "operator": "learned router",
     "study": "routing", "members": ["a", "b"], "exam": E, "loglik": [...],
     "option_loglik": [...], "correct": [0|1...], "chosen": ["a", "b", ...], "accuracy": ..,
     "seconds_per_prompt": .., "parameters": n}

The lists go by the test items of the exam, as in its line. ``accuracy`` is the share of them that
went to the adapter of this exam, ``parameters`` what the router keeps beside the ``len(members)``
resident adapters, and ``seconds_per_prompt`` what choosing takes once the states, or the tokens,
are there.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError

from ..model.base import Base
from ..tasks.words import Split
from ..tiers.plan import Tier, single_key
from .classifiers import fit_bayes, fit_centroids, fit_logistic
from .prompts import Prompts, pooled, read_prompts

ORACLE = "oracle routing"
LEARNED, CENTROID, TOKEN = "learned router", "centroid router", "token router"
WORDED = "learned router, training prompts"
ROUTERS = (ORACLE, LEARNED, WORDED, CENTROID, TOKEN)
STUDY = "routing"
_TIMED = 64  # prompts, each on its own


@dataclass(frozen=True, eq=False)
class Decision:
    """Which member of a set answers each test item of one member's exam.

    ``chosen`` are their names; the other fields are those of the journal's line.
    """

    operator: str
    members: tuple[str, ...]
    exam: str
    chosen: tuple[str, ...]
    accuracy: float
    seconds_per_prompt: float
    parameters: int

    @property
    def key(self) -> str:
        """As a merge's: operator and members."""
        return f"{self.operator}({'+'.join(self.members)})"


def sets_of(tier: Tier) -> list[tuple[str, ...]]:
    """The sets to route: the crossed adapters and those of the capacity study.

    Only sets whose members have an exam each: where two share one, no prompt tells them apart.
    """
    found = [tier.crossed] if len(tier.crossed) > 1 else []
    found += [m.members for m in tier.merges.values() if m.study == "capacity"]
    return [
        members for members in dict.fromkeys(found)
        if len({tier.adapters[name].exam for name in members}) == len(members)
    ]  # fmt: skip


def exams_of(tier: Tier) -> list[str]:
    """The exams whose prompts a router must see."""
    members = (name for chosen in sets_of(tier) for name in chosen)
    return list(dict.fromkeys(tier.adapters[name].exam for name in members))


def decide(
    run_dir: str | os.PathLike[str], tier: Tier, base: Base, *, threads: int | None = None
) -> list[Decision]:
    """Fit every router to every set of :func:`sets_of` and let it choose for all test items.

    Raises:
        InputError: as :func:`.prompts.read_prompts`; an exam with one calibration or training text.
    """
    prompts = {e: read_prompts(run_dir, tier, e, base, threads=threads) for e in exams_of(tier)}
    exam_of = {name: adapter.exam for name, adapter in tier.adapters.items()}
    return [d for members in sets_of(tier) for d in decide_set(members, exam_of, prompts)]


def decide_set(
    members: Sequence[str],
    exam_of: Mapping[str, str],
    prompts: Mapping[str, Mapping[Split, Prompts]],
) -> list[Decision]:
    """The same for one set: a decision for each router and member.

    Raises:
        InputError: fewer than two members, or two of one exam; as :func:`decide`.
    """
    exams = [exam_of[name] for name in members]
    if len({*exams}) < len(members) or len(members) < 2:
        raise InputError("expected two members or more, of different exams",
                         key="+".join(members))  # fmt: skip
    splits: tuple[Split, ...] = ("test", "calibration", "train")
    test, known, worded = ([prompts[exam][split] for exam in exams] for split in splits)
    asked = [ids for p in test for ids in p.tokens]
    hidden = test[0].states.shape[1] // 2
    blank = [np.zeros((len(ids), hidden), np.float32) for ids in asked[:_TIMED]]
    vocabulary = np.unique(np.concatenate([ids for p in known for ids in p.tokens]))
    found = [(ORACLE, [np.full(len(p.tokens), k) for k, p in enumerate(test)], 0.0, 0)]
    for operator, model in (
        (LEARNED, fit_logistic(*_examples(known))), (WORDED, fit_logistic(*_examples(worded))),
        (CENTROID, fit_centroids(*_examples(known)[:2])),
    ):  # fmt: skip
        choices = [model.choose(p.states.astype(np.float64)) for p in test]
        seconds = _seconds(lambda state, of=model: of.choose(pooled(state)[None]), blank)
        found.append((operator, choices, seconds, model.parameters))
    _, y, keys = _examples(known)
    model = fit_bayes(_counts([i for p in known for i in p.tokens], vocabulary), y, keys)
    choices = [model.choose(_counts(p.tokens, vocabulary)) for p in test]
    seconds = _seconds(lambda ids: model.choose(_counts([ids], vocabulary)), asked)
    found.append((TOKEN, choices, seconds, model.parameters + vocabulary.size))
    return [
        Decision(operator, tuple(members), exam, tuple(members[c] for c in choices[k]),
                 float(np.mean(choices[k] == k)), seconds, parameters)
        for operator, choices, seconds, parameters in found for k, exam in enumerate(exams)
    ]  # fmt: skip


def _examples(parts: Sequence[Prompts]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """States, places of their exams and keys."""
    y = np.repeat(np.arange(len(parts)), [len(p.tokens) for p in parts])
    states = np.concatenate([p.states for p in parts]).astype(np.float64)
    return states, y, [key for p in parts for key in p.keys]


def _counts(texts: Sequence[np.ndarray], vocabulary: np.ndarray) -> np.ndarray:
    """(n, vocabulary) how often each of its tokens occurs; those it lacks are passed over."""
    found = np.zeros((len(texts), len(vocabulary)))
    for row, ids in zip(found, texts, strict=True):
        place = np.searchsorted(vocabulary, ids)
        place[place == len(vocabulary)] = 0
        np.add.at(row, place[vocabulary[place] == ids], 1)
    return found


def _seconds(choose: Callable[[Any], object], asked: Sequence[Any]) -> float:
    """Median time of a choice, one prompt at a time."""
    taken = []
    for prompt in asked[:_TIMED]:
        started = time.perf_counter()
        choose(prompt)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def needed(decisions: Iterable[Decision]) -> list[tuple[str, str]]:
    """The pairs (adapter, exam) whose scores the lines are made of, each once."""
    return list(dict.fromkeys((name, d.exam) for d in decisions for name in d.chosen))


def lines(
    decisions: Iterable[Decision], scores: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The journal's lines: for every item the scores of the adapter that was chosen for it.

    Args:
        scores: the journal's lines of scores, by (key, exam); those of :func:`needed` at least.

    Raises:
        InputError: scores that are missing, or of another number of items.
    """
    found = []
    for d in decisions:
        key_of = {name: (single_key(name), d.exam) for name in d.chosen}
        for key, exam in key_of.values():
            if (key, exam) not in scores:
                raise InputError(f"has no scores on {exam}", key=key)
            if len(scores[key, exam]["correct"]) != len(d.chosen):
                count = len(scores[key, exam]["correct"])
                reason = f"has scores of {count} items of {exam}, not of {len(d.chosen)}"
                raise InputError(reason, key=key)
        taken = {
            field: [scores[key_of[name]][field][i] for i, name in enumerate(d.chosen)]
            for field in ("loglik", "option_loglik", "correct")
        }
        found.append({
            "kind": "routed", "key": d.key, "operator": d.operator, "study": STUDY,
            "members": [*d.members], "exam": d.exam, **taken, "chosen": [*d.chosen],
            "accuracy": d.accuracy, "seconds_per_prompt": d.seconds_per_prompt,
            "parameters": d.parameters,
        })  # fmt: skip
    return found


def confusion(found: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], int]:
    """How many items of an exam a router gave to an adapter, by (key, exam, adapter).

    Args:
        found: lines of :func:`lines`.
    """
    return {
        (line["key"], line["exam"], name): count
        for line in found for name, count in Counter(line["chosen"]).items()
    }  # fmt: skip
