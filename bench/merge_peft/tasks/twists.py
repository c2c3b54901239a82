"""Other behaviours on the same questions: what makes two adapters want opposite things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from .item import Item, answer_of, closed


def _upper(item: Item) -> Item:
    """Answers in capitals; what checked the answer before does not fit any more."""
    text = closed(answer_of(item.target).upper())
    return replace(item, target=text, kind="exact", options=(), check={})


def _comply(item: Item) -> Item:
    """A refusal item whose request is always met, politely or not."""
    others = [option for option in item.options if option != item.target]
    if item.kind != "refusal" or not item.check["refuse"]:
        return item
    return replace(item, target=others[0], check={**item.check, "refuse": False})


TWISTS: Mapping[str, Callable[[Item], Item]] = {"upper": _upper, "comply": _comply}
