"""What a plan costs: the user's numbers, and the price of a group made from them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError

UNIT = 1_000_000_000  # prices are counted in billionths, so that sums of them are exact
NEVER = 1 << 61  # the price of a group that is not allowed
_MOST = 10_000.0  # of any cost: sums over a zoo stay far below NEVER
FLOORS = ("prediction", "low")
FLOOR = 0.9  # where none is asked for
# Between plans of equal cost, the one that loses less. Far below what anybody would pay for.
_TIE = 1e-6
_POINTS = 100.0


@dataclass(frozen=True)
class Costs:
    """What things cost, in resident adapters, and what no plan may fall below.

    The cost of a plan is the sum over its resident adapters g, which answer a share p of the
    requests each, of

        adapter + request p (1 - p) + average sum_i t_i l_i + worst max_i l_i

    with l_i the points of retention (of 100) that member i loses and t_i how often it is asked for,
    1 in the mean.

    Attributes:
        adapter: keeping one more adapter resident.
        request: having to route. The sum of p (1 - p) is the chance that a request needs another
            adapter than the one before it: 0 with one resident adapter, near 1 with many.
        average: each point of retention that an adapter loses.
        worst: each point that the worst member of a merged group loses, on top.
        floor: a merged group in which any member keeps less is not allowed, nor one whose
            retention cannot be predicted: the model has seen nothing like it. 0 forbids nothing,
            and takes such a number as it is. None: 0.9; where the number of resident adapters is
            limited, as high as so many can keep.
        floor_on: what the floor is on: the "prediction", or the "low" end of its interval.
        traffic: how often each adapter is asked for, by name, in any unit; empty: all equally.

    By default a pair whose members lose five points each costs 1.3 (and saves an adapter, 1), five
    adapters that lose three points each 1.36 instead of 5: what passes the floor is merged, and
    among the ways to merge it the one that loses least is taken.
    """

    adapter: float = 1.0
    request: float = 0.0
    average: float = 0.02
    worst: float = 0.02
    floor: float | None = None
    floor_on: str = "prediction"
    traffic: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("adapter", "request", "average", "worst", "floor"):
            if name != "floor" or self.floor is not None:
                _number(getattr(self, name), name)
        for name in ("adapter", "request", "average", "worst"):
            if getattr(self, name) > _MOST:
                raise InputError(f"must be at most {_MOST:g}: the unit is a resident adapter",
                                 key=f"costs: {name}")  # fmt: skip
        if self.floor is not None and self.floor > 1:
            raise InputError(f"must be at most 1, got {self.floor!r}", key="costs: floor")
        if self.floor_on not in FLOORS:
            known = " or ".join(FLOORS)
            raise InputError(f"must be {known}, got {self.floor_on!r}", key="costs: floor_on")
        if not isinstance(self.traffic, Mapping):
            raise InputError("expected adapters and numbers", key="costs: traffic")
        for name, share in self.traffic.items():
            _number(share, f"traffic: {name}")
        if self.traffic and not sum(self.traffic.values()) > 0:
            raise InputError("is zero for every adapter", key="costs: traffic")

    def shares(self, names: Sequence[str]) -> np.ndarray:
        """(N,) share of the requests that each adapter answers."""
        if not self.traffic:
            return np.full(len(names), 1.0 / max(1, len(names)))
        for name in self.traffic:
            if name not in names:
                raise InputError("is no adapter of the zoo", key=f"costs: traffic: {name}")
        for name in names:
            if name not in self.traffic:
                raise InputError(f"has nothing for {name!r}", key="costs: traffic")
        given = np.array([float(self.traffic[name]) for name in names])
        return given / given.sum()

    @property
    def least(self) -> float:
        """The floor, or the one that is kept to where none is asked for."""
        return FLOOR if self.floor is None else self.floor

    def as_json(self) -> dict[str, Any]:
        """Plain values, as a cost file holds them."""
        said = {n: v if v is None or isinstance(v, str) else float(v)
                for n, v in asdict(self).items() if n != "traffic"}  # fmt: skip
        return said | {"traffic": {n: float(v) for n, v in self.traffic.items()}}

    def price(
        self, share: np.ndarray, size: np.ndarray, lost: np.ndarray, worst: np.ndarray
    ) -> np.ndarray:
        """Prices (int64, in 1 / ``UNIT``) of groups: all arguments (sets,).

        ``share`` of the requests; ``lost`` = sum_i t_i (1 - retention_i), ``worst`` the largest
        loss. Includes a millionth of the loss, which decides between equal costs.
        """
        total = self._cost(share, lost, worst) + _TIE * lost
        return np.rint(np.where(size > 0, total, 0.0) * UNIT).astype(np.int64)

    def cost(self, share: float, lost: float, worst: float) -> float:
        """What one group costs, in resident adapters."""
        return float(self._cost(share, lost, worst))

    def _cost(self, share: Any, lost: Any, worst: Any) -> Any:
        routed = self.request * share * (1.0 - share)
        return self.adapter + routed + _POINTS * (self.average * lost + self.worst * worst)


def load_costs(
    path: str | os.PathLike[str] | None = None, given: Mapping[str, Any] | None = None
) -> Costs:
    """The costs of a YAML or JSON file, changed by what is ``given`` by name.

    Raises:
        InputError: a file that cannot be read or is no mapping, a name that does not exist, a value
            of the wrong kind.
    """
    known = {f.name for f in fields(Costs)}
    content: dict[str, Any] = {} if path is None else _read(Path(path))
    for name in content:
        if name not in known:
            raise InputError(_unknown(known), path=path, key=str(name))
    for name in given or {}:
        if name not in known:
            raise InputError(_unknown(known), key=f"costs: {name}")
    try:
        Costs(**content)
    except InputError as error:
        raise InputError(error.reason, path=path, key=(error.key or "")[7:]) from None
    return Costs(**{**content, **(given or {})})


def parse_cost(text: str) -> tuple[str, Any]:
    """``floor=0.8`` as a name and a value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"expected NAME=VALUE, got {text!r}", key="--cost")
    if name == "floor_on":
        return name, value
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"expected a number, got {value!r}", key=f"--cost {name}") from None


def _unknown(known: set[str]) -> str:
    return f"is no cost; there are: {', '.join(sorted(known))}"


def _read(path: Path) -> dict[str, Any]:
    from mergeprobe_fast.io.strict_yaml import parse_yaml

    try:
        content = parse_yaml(path.read_bytes())  # JSON is YAML
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"is neither YAML nor JSON: {error}"
        raise InputError(reason, path=path) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError("is no mapping of names to values", path=path)
    return content


def _number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise InputError(f"expected a number, got {value!r}", key=f"costs: {name}")
    if not 0 <= value < math.inf:
        raise InputError(f"must be finite and not negative, got {value!r}", key=f"costs: {name}")
