"""Which resident adapter answers a request: prototypes from the factors, a rule from texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast import _env
from mergeprobe_fast.engine.sweep import sweep
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.router_file import ARROW, LINEAR, LinearInfo, Router, RouterInfo
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.planning.discriminant import choose_held_out, fit
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.calibration import Calibration

TOP_K, TEMPERATURE = 3, 1.0  # PEFT's
SKIP_FIRST = 1  # what calibrate leaves out by default
LEAST_TEXTS = 10  # of a class: two in each of five folds


def prototypes(zoo: Zoo, *, threads: int | None = None) -> dict[str, np.ndarray]:
    """The top right singular vector of every delta, by linear module: float32 (N, d_in).

    The direction of the module's input that the delta amplifies most, from canonical factors: it
    depends on the delta alone, not on how A and B share it. A vector's largest entry (of equal
    ones the first) is positive. Zeros for an adapter that lacks the module or whose delta is zero
    there. Where the two largest singular values agree, it is one of many.

    Arrow (Ostapenko et al. 2024, arXiv 2405.11157).

    Raises:
        InputError: a file that changed, or a factor that is not finite; names file and key.
    """
    found: dict[str, np.ndarray] = {}
    for chunk in sweep(zoo, _env.threads_or_default(threads), device=current_device()):
        for k, module in enumerate(chunk.modules):
            if module.kind != "linear":
                continue
            rows = np.zeros((len(zoo), module.d_in), np.float32)
            for i in range(*chunk.bounds[k : k + 2]):
                if chunk.rank[i]:
                    rows[chunk.adapter[i]] = _unit(chunk.vectors("v", i)[:, 0])
            found[module.name] = rows
    return found


def _unit(vector: np.ndarray) -> np.ndarray:
    wide = vector.astype(np.float64)
    return wide / (np.linalg.norm(wide) * np.sign(wide[np.abs(wide).argmax()]))


@dataclass(frozen=True)
class Requests:
    """Texts of a calibration, and which resident adapters answer those of a domain.

    ``answers`` maps every domain to the residents that hold an adapter of it, the one that its
    requests should go to first.
    """

    calibration: Calibration
    answers: Mapping[str, Sequence[str]]


@_env.one_blas_thread()
def build_router(
    zoo: Zoo, requests: Requests | None = None, *, threads: int | None = None
) -> tuple[RouterInfo, dict[str, np.ndarray]]:
    """A router among the adapters of ``zoo``, which are those that stay resident.

    Without ``requests`` the rule is "arrow", from the factors alone. With them a linear rule is
    fitted as well, and the one that sends more texts to an adapter of their domain is the router's
    own; texts that the linear rule is measured on were held out of its fit. Texts are what the
    calibration sampled of them: of prompts with completions, tokens of both.

    Returns:
        What ``io.router_file.write_router`` takes.
    """
    rows = prototypes(zoo, threads=threads)
    tensors = {f"prototype.{name}": values for name, values in rows.items()}
    info = RouterInfo(
        zoo.base_model, {a.name: fingerprint(a) for a in zoo},
        {name: values.shape[1] for name, values in rows.items()},
        min(TOP_K, len(zoo)), TEMPERATURE,
        requests.calibration.info.skip_first if requests else SKIP_FIRST, ARROW, None, {}, 0,
    )  # fmt: skip
    notes = ["no linear module is adapted: there are no prototypes"]
    if rows:
        known = np.any([values.any(axis=1) for values in rows.values()], axis=0)
        lacks = [a.name for a, there in zip(zoo, known, strict=True) if not there]
        notes = [f"{name} has no prototype: arrow never picks it" for name in lacks]
    if requests is not None:
        info = _measured(info, tensors, zoo, requests, notes)
    return replace(info, notes=tuple(notes)), tensors


def _measured(
    info: RouterInfo, tensors: dict[str, np.ndarray], zoo: Zoo, requests: Requests,
    notes: list[str],
) -> RouterInfo:  # fmt: skip
    """``info`` with a linear rule, if there can be one, and the accuracy of both."""
    calibration, answers = requests.calibration, requests.answers
    texts = {domain: np.unique(calibration.sampled_tokens(domain)[0]) for domain in answers}
    accuracy: dict[str, float] = {}
    covered = [name for name in info.modules if name in calibration.modules]
    if covered:
        router = Router(calibration.path, info, tensors)
        right = _arrow_right(router, covered, requests, texts)
        accuracy[ARROW] = float(np.concatenate(right).mean())
    for domain, residents in answers.items():
        if len(residents) > 1:
            notes.append(f"requests of {domain} go to {residents[0]}, "
                         f"though {', '.join(residents[1:])} answers them too")  # fmt: skip
    linear = None
    classes = list(dict.fromkeys(residents[0] for residents in answers.values()))
    label = {domain: classes.index(residents[0]) for domain, residents in answers.items()}
    module = _first(calibration, zoo)
    count = np.bincount([label[d] for d in answers for _ in texts[d]], minlength=len(classes))
    if len(classes) < 2:
        notes.append("one adapter answers all domains of the calibration: nothing to learn")
    elif module is None:
        notes.append("the calibration has no module that the adapters change: nothing to learn")
    elif count.min() < LEAST_TEXTS:
        few = classes[int(count.argmin())]
        notes.append(f"the calibration has {count.min()} texts for {few}; "
                     f"a rule is learned from {LEAST_TEXTS} or more")  # fmt: skip
    else:
        x = np.concatenate([_means(calibration, domain, module) for domain in answers])
        y = np.repeat([label[d] for d in answers], [len(texts[d]) for d in answers])
        model, held_out = fit(x, y), choose_held_out(x, y)
        of = [domain for domain in answers for _ in texts[domain]]
        accuracy[LINEAR] = float(np.mean(
            [classes[k] in answers[d] for k, d in zip(held_out, of, strict=True)]
        ))  # fmt: skip
        linear = LinearInfo(
            module, x.shape[1], tuple(classes), {d: r[0] for d, r in answers.items()},
            model.shrinkage,
        )  # fmt: skip
        tensors |= {"request.weight": model.weight, "request.bias": model.bias}
    rule = LINEAR if linear and accuracy[LINEAR] >= accuracy.get(ARROW, 0) else ARROW
    total = sum(map(len, texts.values())) if accuracy else 0
    return replace(info, rule=rule, linear=linear, accuracy=accuracy, texts=total)


def _first(calibration: Calibration, zoo: Zoo) -> str | None:
    """The first module that any adapter changes, in the order of calls: none is before it."""
    adapted = {module.name for module in zoo.modules}
    return next((name for name in calibration.modules if name in adapted), None)


def _means(calibration: Calibration, domain: str, module: str) -> np.ndarray:
    """The mean of a module's inputs over the sampled tokens of each text: float64 (texts, d_in)."""
    sequence, _ = calibration.sampled_tokens(domain)
    return _by_text(calibration.inputs(domain, module).astype(np.float64), sequence)


def _by_text(rows: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """Means of rows over tokens of one text; ``sequence`` is sorted."""
    _, first, count = np.unique(sequence, return_index=True, return_counts=True)
    return np.add.reduceat(rows, first, axis=0) / count[:, None]


def _arrow_right(
    router: Router, modules: Sequence[str], requests: Requests, texts: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """For every domain, whether each of its texts goes to one of its adapters."""
    calibration = requests.calibration
    right = []
    for domain, residents in requests.answers.items():
        sequence, _ = calibration.sampled_tokens(domain)
        total = np.zeros((len(texts[domain]), len(router.adapters)))
        for module in modules:
            total += _by_text(router.votes(module, calibration.inputs(domain, module)), sequence)
        answered = [router.adapters.index(name) for name in residents]
        right.append(np.isin(total.argmax(axis=1), answered))
    return right


def answers_of(
    zoo: Zoo, domains: Sequence[str], residents: Mapping[str, Sequence[str]],
    retention: Mapping[str, float | None],
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    """Which residents answer each domain, the one to prefer first.

    That is the one in which the domain's adapters keep most, by ``retention`` of the original
    adapters (None counts as least), then the one that comes first.

    Args:
        zoo: the original adapters, whose domains are ``domains``, in order.
        residents: resident -> the originals in it.
    """
    held: dict[str, dict[str, list[float]]] = {domain: {} for domain in dict.fromkeys(domains)}
    domain_of = dict(zip(zoo.names, domains, strict=True))
    for resident, members in residents.items():
        for member in members:
            kept = retention.get(member)
            found = held[domain_of[member]].setdefault(resident, [])
            found.append(-np.inf if kept is None else kept)
    if any(not found for found in held.values()):
        lost = next(domain for domain, found in held.items() if not found)
        raise InputError("no resident adapter holds one of this domain", key=lost)
    return {
        domain: tuple(sorted(found, key=lambda name: -max(found[name])))  # stable: then the first
        for domain, found in held.items()
    }
