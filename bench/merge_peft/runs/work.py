"""One unit of a run's work, on one thread: an adapter trained, or a model measured on exams."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.merging import MergedAdapter
from mergeprobe_fast.zoo import open_zoo

from ..model.base import Base
from ..model.delta import Delta
from ..model.suffix import threads_of
from ..outcome.journal import Line
from ..stages.combine import adapter_folder, combine
from ..stages.evaluate import Evaluation
from ..stages.train import OTHERS_ITEMS, train
from ..tasks.build import DOMAINS, build
from ..tasks.item import Item
from ..tiers.plan import BASE, AdapterPlan, MergePlan, Tier

# What all evaluations of a worker may hold. Beside them SmolLM2-135M, the libraries and a batch on
# its way were seen to take 2.2 GB, so that a worker has 3.5 GB at most, and 2.3 GB in tier ci.
_EVALUATIONS_NBYTES = 1_300_000_000


@dataclass(frozen=True)
class Unit:
    """Work that is done as a whole.

    Attributes:
        what: "train" makes the adapter ``key``; "score" measures what ``key`` names ("base",
            ``single_key(adapter)``, or a merge) on ``exams``.
        cost: in seconds of one core, about.
        shares: units that say the same here share what a worker has prepared.
    """

    what: Literal["train", "score"]
    key: str
    exams: tuple[str, ...] = ()
    adapter: str = ""  # of a single one
    cost: float = 1.0
    shares: str = ""


class Worker:
    """Does units one after the other; what it returns does not depend on what it did before."""

    def __init__(self, tier: Tier, out: Path, base: Base) -> None:
        self._tier, self._out, self._base = tier, out, base
        self._evaluations: dict[str, tuple[Evaluation, int]] = {}  # with bytes, last used last
        self._texts: tuple[Any, ...] = ()  # whose states are kept from the last training
        self._used: set[int] = set()  # layers that adapters, or the evaluations, begin with

    @_env.one_blas_thread()
    def run(self, unit: Unit) -> list[Line]:
        """Lines for the journal.

        Raises:
            InputError: a training or a single adapter that fails; what merges refuse is a line.
        """
        with threads_of(1):
            return self._train(unit) if unit.what == "train" else self._score(unit)

    def _train(self, unit: Unit) -> list[Line]:
        plan = self._tier.adapters[unit.key]
        recipe, exam = plan.recipe, self._tier.exams[plan.exam]
        texts = (plan.exam, plan.items, recipe.seed, recipe.layers[0])
        if texts != self._texts:
            self._forget(recipe.layers[0])
            self._texts = texts
        items = exam.items("train", plan.items, recipe.seed)
        result = train(
            recipe, self._base, [*items, *osrm_items(plan)], adapter_folder(self._out, plan.name),
            self._out / "probes" / plan.name, threads=1,
        )  # fmt: skip
        (adapter,) = open_zoo([result.adapter])
        return [{
            "kind": "trained", "adapter": plan.name, "exam": plan.exam, "recipe": asdict(recipe),
            "items": result.items, "first_loss": result.first_loss, "loss": result.loss,
            "seconds": None if result.seconds is None else round(result.seconds, 3),
            "rank": max(m.rank for m in adapter.modules.values()),
            "parameters": adapter.parameters, "note": plan.note,
        }]  # fmt: skip

    def _score(self, unit: Unit) -> list[Line]:
        plan = self._tier.merges.get(unit.key)
        if plan is None:
            delta = None if unit.key == BASE else adapter_folder(self._out, unit.adapter)
            return self._scores(unit, delta)
        try:
            merged, line = self._merge(plan)
            return [line, *self._scores(unit, merged)]
        except (InputError, np.linalg.LinAlgError) as error:
            name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            return [{
                "kind": "failed", "key": plan.key, "operator": plan.operator,
                "members": list(plan.members),
                "reason": f"{name}{error}",
            }]  # fmt: skip

    def _merge(self, plan: MergePlan) -> tuple[MergedAdapter, Line]:
        started = time.perf_counter()
        merged, weights = self._combined(plan)
        return merged, {
            "kind": "merged", "key": plan.key, "operator": plan.operator,
            "members": list(plan.members), "weights": weights, "study": plan.study,
            "rank": max(len(m.a) for m in merged.modules),
            "parameters": sum(m.a.size + m.b.size for m in merged.modules),
            "seconds": round(time.perf_counter() - started, 4),
        }  # fmt: skip

    def _combined(self, plan: MergePlan) -> tuple[MergedAdapter, list[float]]:
        return combine(self._tier, self._out, plan)

    def _scores(self, unit: Unit, delta: Delta) -> list[Line]:
        lines = []
        # Those that are there first, so that they are used before they have to go.
        for name in sorted(unit.exams, key=lambda name: (name not in self._evaluations, name)):
            evaluation = self._evaluation(name)
            started = time.perf_counter()
            scores = evaluation.run(delta)
            lines.append({
                "kind": "scores", "key": unit.key, "exam": name, "loglik": scores.loglik.tolist(),
                "option_loglik": scores.option_loglik.tolist(),
                "correct": scores.correct.astype(int).tolist(),
                "seconds": round(time.perf_counter() - started, 3),
            })  # fmt: skip
        return lines

    def _evaluation(self, name: str) -> Evaluation:
        if name in self._evaluations:
            self._evaluations[name] = self._evaluations.pop(name)
            return self._evaluations[name][0]
        tier = self._tier
        items = tier.exams[name].items("test", tier.test_items, tier.seed)
        nbytes = self._nbytes(items)
        while self._evaluations and (
            nbytes + sum(kept for _, kept in self._evaluations.values()) > _EVALUATIONS_NBYTES
        ):
            del self._evaluations[next(iter(self._evaluations))]
        self._texts = ()
        self._forget(tier.first_layer)
        found = Evaluation(items, self._base, tier.first_layer, threads=1)
        self._forget(tier.first_layer)
        self._evaluations[name] = found, nbytes
        return found

    def _forget(self, first: int) -> None:
        """Drop what entered the layers from ``first`` on, and from any other: it was in batches of
        its own, in which the last bits are others. An evaluation keeps what it needs.
        """
        self._used.add(first)
        for layer in self._used:
            self._base.runner(layer).forget()

    def _nbytes(self, items: Sequence[Item]) -> int:
        """Of an evaluation: what enters its layers, and keys and values below where it writes."""
        config = self._base.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = config.hidden_size // config.num_attention_heads * heads
        total = 0
        for item in items:
            texts = (item.prompt, *(item.options or (item.target,)))
            tokens = sum(len(self._base.encode(text)) for text in texts)
            written = item.kind == "code" or "write" in item.check
            below = 2 * width * self._tier.first_layer if written else 0
            total += 4 * tokens * (config.hidden_size + below)
        return total


def osrm_items(plan: AdapterPlan) -> list[Item]:
    """What OSRM's initialisation looks at: items of the other domains, whatever the tier has."""
    if plan.recipe.variant != "osrm":
        return []
    return [
        item for domain in DOMAINS if domain != plan.recipe.domain
        for item in build(domain, split="train", count=OTHERS_ITEMS, seed=plan.recipe.seed)
    ]  # fmt: skip
