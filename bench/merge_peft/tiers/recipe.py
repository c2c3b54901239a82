"""How one adapter of the benchmark is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergeprobe_fast.errors import InputError

from ..tasks.item import Item

Variant = Literal["lora", "osrm", "flylora"]
VARIANTS: tuple[Variant, ...] = ("lora", "osrm", "flylora")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. ``seed`` draws its items and their order,
    ``init_seed`` its A0.

    ``tasks`` are those of ``domain`` it is trained on, all of them by default. ``layers`` are the
    first and the last that are adapted. Variants:

    - lora: A0 as PEFT draws it; adapters of one ``init_seed`` share it.
    - osrm: A0 in the directions that the other domains' inputs have least of; A is trained too, as
      the authors' code does by default.
    - flylora: A is sparse, random and frozen; only B is trained.

    Raises:
        InputError: a number or a name that makes no sense.
    """

    domain: str
    tasks: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16
    lr: float = 2e-3
    steps: int = 50
    batch: int = 8
    seed: int = 0
    init_seed: int = 0
    layers: tuple[int, int] = (26, 29)
    projections: tuple[str, ...] = PROJECTIONS
    variant: Variant = "lora"

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InputError(f"expected an integer from 1, got {getattr(self, name)!r}",
                                 key=name)  # fmt: skip
        for name in ("seed", "init_seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise InputError(f"expected an integer from 0, got {getattr(self, name)!r}",
                                 key=name)  # fmt: skip
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"expected a positive number, got {getattr(self, name)!r}",
                                 key=name)  # fmt: skip
        if self.variant not in VARIANTS:
            raise InputError(f"{self.variant!r} is none of {', '.join(VARIANTS)}", key="variant")
        if not 0 <= self.layers[0] <= self.layers[1]:
            raise InputError(f"expected first and last, got {self.layers!r}", key="layers")
        if not self.projections or len({*self.projections}) < len(self.projections):
            raise InputError("expected different names, one at least", key="projections")

    def takes(self, item: Item) -> bool:
        """Whether an item is one to train on."""
        return item.domain == self.domain and (not self.tasks or item.task in self.tasks)
