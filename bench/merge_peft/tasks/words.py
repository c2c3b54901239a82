"""Word lists of the templates: one set for training and test, another for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test", "calibration"]
SPLITS: tuple[Split, ...] = ("train", "test", "calibration")


@dataclass(frozen=True)
class Words:
    """Names, countable things, adjectives and nouns of one source of templates."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAINING = Words(
    names=_words("Tom Ana Sam Mia Leo Zoe Max Eva Ben Lily Omar Ivy"),
    things=_words("apples books coins cards shells pens stamps marbles"),
    adjectives=_words(
        "red blue old small quiet bright wooden broken early heavy round silver warm empty "
        "distant narrow gentle rusty golden sleepy"
    ),
    nouns=_words(
        "river garden window kettle bridge lantern mountain pencil station orchard harbour ladder "
        "blanket forest violin market island basket engine mirror candle valley ticket feather"
    ),
)
CALIBRATION = Words(
    names=_words("Nora Felix Ruth Hugo Priya Karl Aisha Peter Wanda Jon"),
    things=_words("buttons pebbles tickets bottles candles peaches magnets ribbons"),
    adjectives=_words(
        "green tall loud plain stone folded late light square copper cold full nearby wide rough "
        "shiny purple awake"
    ),
    nouns=_words(
        "ocean meadow door spoon tunnel torch desert brush airport vineyard canal staircase pillow "
        "jungle trumpet bakery lagoon drawer motor curtain match glacier coupon button"
    ),
)


def words_of(split: Split) -> Words:
    """Calibration texts use other words than those of training and test."""
    return CALIBRATION if split == "calibration" else TRAINING
