"""Router files: which of the resident adapters answers a request, or a token.

``router.json``
    which adapters, by name and fingerprint, and what was measured (``RouterInfo`` has the fields);
``router.safetensors``
    ``prototype.<module>``   F32 (E, d_in), one unit row per adapter: the direction of the module's
        input that the adapter's delta amplifies most (its top right singular vector); zeros where
        the adapter lacks the module, or its delta there is zero;
    ``request.weight``, ``request.bias``   F64 (E', d_in) and (E',), if there is a linear part: one
        row for each of ``linear.adapters``.

Two rules read it. "arrow" (Ostapenko et al. 2024, arXiv 2405.11157; PEFT's ``tuners.lora.arrow``)
needs no data: a token with input x belongs to adapter e of a module as much as |v_e . x|, of which
the ``top_k`` largest, divided by ``temperature``, go through a softmax; where one adapter has to
answer a whole request, the tokens of all modules vote. "linear" was fitted to a calibration:
weight . mean(x) + bias, for the mean over a request's tokens of one module's inputs, which no
adapter has touched yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import router_json, strict_json
from .declared import read_declared
from .read import read_tensor
from .router_json import ARROW, LINEAR, ROUTER_NAME, ROUTER_TENSORS, RULES, LinearInfo, RouterInfo
from .safetensors import write
from .strict_json import Bad

__all__ = [
    "ARROW",
    "LINEAR",
    "ROUTER_NAME",
    "ROUTER_TENSORS",
    "Choice",
    "LinearInfo",
    "Router",
    "RouterInfo",
    "load_router",
    "write_router",
]

_UNIT = 1e-4  # of a float32 row of 10^5 numbers, rounded: 1e-5


@dataclass(frozen=True)
class Choice:
    """The adapter that answers a request, by which rule, and every adapter's score."""

    adapter: str
    rule: str
    scores: Mapping[str, float]  # of "arrow" shares of the votes, of "linear" log-odds


class Router:
    """An opened router: every number read and checked. numpy only.

    Attributes:
        info: what ``router.json`` says.
    """

    def __init__(self, path: Path, info: RouterInfo, tensors: Mapping[str, np.ndarray]) -> None:
        self.path, self.info, self._tensors = path, info, tensors

    def __repr__(self) -> str:
        return f"<Router of {len(self.adapters)} adapters, {self.info.rule}>"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The resident adapters, the rows of every prototype (E)."""
        return tuple(self.info.adapters)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that have prototypes."""
        return tuple(self.info.modules)

    def needed(self, rule: str | None = None) -> tuple[str, ...]:
        """The modules whose inputs ``choose`` reads."""
        if self._rule(rule) == LINEAR:
            return (self.info.linear.module,)
        return self.modules

    def prototypes(self, module: str) -> np.ndarray:
        """Unit rows, or zeros for an adapter without a delta there: float32 (E, d_in)."""
        if module not in self.info.modules:
            raise InputError("has no prototypes of this module", path=self.path, key=module)
        return self._tensors[f"prototype.{module}"]

    def scores(self, module: str, x: Any) -> np.ndarray:
        """|x . v_e| of every token and adapter: float64 (T, E) for inputs (T, d_in)."""
        rows = self.prototypes(module).astype(np.float64)
        return np.abs(_tokens(x, rows.shape[1], module) @ rows.T)

    def weights(self, module: str, x: Any) -> np.ndarray:
        """How a token is shared among the adapters: float64 (T, E), rows sum to 1.

        Softmax over the ``top_k`` highest scores of the adapters that have the module, of equal
        ones the first, each divided by ``temperature``.
        """
        score = self.scores(module, x)
        known = np.flatnonzero(self.prototypes(module).any(axis=1))
        weights = np.zeros_like(score)
        if not known.size:
            return weights
        score = score[:, known] / self.info.temperature
        top = np.argsort(-score, axis=1, kind="stable")[:, : self.info.top_k]
        chosen = np.take_along_axis(score, top, axis=1)
        share = np.exp(chosen - chosen[:, :1])
        share /= share.sum(axis=1, keepdims=True)
        np.put_along_axis(weights, known[top], share, axis=1)
        return weights

    def votes(self, module: str, x: Any) -> np.ndarray:
        """1 for the adapter with a token's highest score, of equal ones the first: (T, E).

        One adapter answers a whole request: who comes second at a token does not matter, and
        neither does how large activations are in a module.
        """
        score = self.scores(module, x)
        known = self.prototypes(module).any(axis=1)
        if not known.any():
            return np.zeros_like(score)
        best = np.where(known, score, -1.0).argmax(axis=1)
        return np.eye(len(self.adapters))[best]

    def choose(self, inputs: Mapping[str, Any], rule: str | None = None) -> Choice:
        """The adapter for one request, all tokens of which are given.

        Args:
            inputs: module -> what it is fed on the base model without adapters, (T, d_in), of
                :meth:`needed`; for "arrow" every token of every module given votes, "linear" reads
                the mean input. The first ``skip_first`` tokens are left out, where activations are
                massive and much the same for all requests, unless there are no others. Of equal
                scores the first adapter has it.
            rule: instead of ``info.rule``.

        Raises:
            InputError: no inputs of a module that is needed, inputs of another shape, a number
                that is not finite, a rule that this router lacks.
        """
        rule = self._rule(rule)
        if rule == LINEAR:
            names, module = self.info.linear.adapters, self.info.linear.module
            if module not in inputs:
                raise InputError("inputs are missing", path=self.path, key=module)
            x = self._read(inputs[module], self.info.linear.d_in, module).mean(axis=0)
            found = self._tensors["request.weight"] @ x + self._tensors["request.bias"]
        else:
            names = self.adapters
            given = [module for module in self.modules if module in inputs]
            if not given:
                reason = "no inputs of a module with prototypes" if self.modules else (
                    "has no prototypes: no linear module is adapted"
                )  # fmt: skip
                raise InputError(reason, path=self.path)
            size = self.info.modules
            votes = (self.votes(m, self._read(inputs[m], size[m], m)) for m in given)
            found = np.mean([v.mean(axis=0) for v in votes], axis=0)
        scores = dict(zip(names, map(float, found), strict=True))
        return Choice(names[int(np.argmax(found))], rule, scores)

    def _read(self, x: Any, d_in: int, module: str) -> np.ndarray:
        x, first = _tokens(x, d_in, module), self.info.skip_first
        return x[first:] if len(x) > first else x

    def _rule(self, rule: str | None) -> str:
        rule = self.info.rule if rule is None else rule
        if rule not in RULES or (rule == LINEAR and self.info.linear is None):
            has = RULES if self.info.linear is not None else (ARROW,)
            raise InputError(f"has no rule {rule!r}, only {', '.join(has)}", path=self.path)
        return rule


def _tokens(x: Any, d_in: int, module: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != d_in or not len(x):
        raise InputError(f"expected inputs (tokens, {d_in}), got {x.shape}", key=module)
    if not np.isfinite(x).all():
        raise InputError("inputs have NaN or Inf", key=module)
    return x


def write_router(
    folder: str | os.PathLike[str], info: RouterInfo, tensors: Mapping[str, np.ndarray]
) -> None:
    """Write both files into an existing folder; atomic where that folder is an ``AtomicFolder``.

    Raises:
        InputError: tensors that are not exactly those that ``info`` declares, or not finite.
    """
    folder = Path(folder)
    _check(info, tensors, folder / ROUTER_TENSORS)
    write(folder / ROUTER_TENSORS, tensors)
    digest = hashlib.sha256((folder / ROUTER_TENSORS).read_bytes()).hexdigest()
    value = router_json.to_json(info, digest)
    content = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / ROUTER_NAME).write_bytes((content + "\n").encode("utf-8"))


def load_router(folder: str | os.PathLike[str]) -> Router:
    """Read the router of a folder, every number, and check it against its own hash.

    Raises:
        InputError: naming file, key and reason, for anything but a complete router of this
            version whose tensors are those that were written.
    """
    folder = Path(folder)
    path = folder / ROUTER_NAME
    try:
        info, digest = router_json.parse(strict_json.read(path))
    except Bad as bad:
        raise InputError(bad.reason, path=path, key=bad.key) from None
    file = folder / ROUTER_TENSORS
    refs = read_declared([file], info.declared(), "this router")
    tensors = {key: read_tensor(ref) for key, ref in refs.items()}
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise InputError(f"is not the file that {ROUTER_NAME} was written with", path=file)
    _check(info, tensors, file)
    return Router(path, info, tensors)


def _check(info: RouterInfo, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    declared = info.declared()
    for key in sorted(tensors.keys() ^ declared.keys()):
        reason = "is missing" if key in declared else "is not a tensor of this router"
        raise InputError(reason, path=path, key=key)
    for key, values in tensors.items():
        if not np.isfinite(values).all():
            raise InputError("has NaN or Inf", path=path, key=key)
        if key.startswith("prototype."):
            sizes = np.linalg.norm(values.astype(np.float64), axis=1)
            if (np.minimum(sizes, np.abs(sizes - 1)) > _UNIT).any():
                raise InputError("has a row that is no unit vector", path=path, key=key)
