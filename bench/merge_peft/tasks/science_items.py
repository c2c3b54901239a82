"""Terms of WordNet and the chemical elements, as choices among four of a kind.

Wrong options come from the same split as the right one, so no term of one split is seen in another.
The question does not show them: the model is judged by which it finds likeliest, and a model this
small learns less from a list than from the question alone.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial

from mergeprobe_fast.merge_peft.tasks.item import Item, chat, closed
from mergeprobe_fast.merge_peft.tasks.splits import rows, share_of
from mergeprobe_fast.merge_peft.tasks.words import Split

CATEGORIES = {
    "anatomy": ("anatomy",),
    "conditions": ("condition",),
    "life": ("animal", "plant"),
    "substances": ("substance",),
    "earth": ("natural object", "natural phenomenon", "natural process"),
    "quantities": ("quantity or unit",),
}
TERM_OF = (
    "Which {category} term means: {gloss}?",
    "What is the word for: {gloss}?",
    "Name this {category}: {gloss}.",
    "Which term is this: {gloss}?",
    "Give the term that means {gloss}.",
    "One term for {gloss}, please.",
    "In science, what do we call this: {gloss}?",
    "Here is a definition: {gloss}. Which term does it define?",
)
GLOSS_OF = (
    "What is meant by {term}?",
    "Define {term}.",
    "What does {term} mean?",
    "Explain the term {term}.",
    "A dictionary says of {term}:",
)
SYMBOL_OF = (
    "What is the chemical symbol of {name}?",
    "How do chemists write {name}?",
    "Give the symbol for the element {name}.",
)
NAME_OF = (
    "Which element has the symbol {symbol}?",
    "What does the chemical symbol {symbol} stand for?",
    "Name the element written {symbol}.",
)
NUMBERED = (
    "Which element has the atomic number {number}?",
    "What stands at place {number} of the periodic table?",
    "An atom with {number} protons belongs to which element?",
)
OPTIONS = 4


def _item(
    task: str, key: str, question: str, wrong: Sequence[str], right: str, rng: random.Random,
    split: Split,
) -> Item:  # fmt: skip
    options = [right, *wrong]
    rng.shuffle(options)
    return Item(
        domain="science",
        task=f"science.{task}",
        key=key,
        prompt=chat(question),
        target=closed(right),
        kind="choice",
        options=tuple(closed(option) for option in options),
        source="calibration" if split == "calibration" else "train",
    )


@cache
def _terms(category: str, split: Split) -> tuple[tuple[str, str], ...]:
    """Terms with a gloss of their own that does not say them; elements are a task of their own."""
    known = rows("science_wordnet.tsv")
    times = Counter(gloss for _, gloss, _ in known)
    elements = {name for _, _, name in rows("elements.tsv")}
    glosses = {
        term: gloss
        for term, gloss, kind in known
        if kind == category
        and times[gloss] == 1
        and term not in elements
        and not re.search(rf"\b{re.escape(term)}", gloss, re.IGNORECASE)
    }
    chosen = share_of(f"science.{category}", glosses, split)
    return tuple((term, glosses[term]) for term in chosen)


def term(task: str, rng: random.Random, split: Split) -> Item:
    category = rng.choice(CATEGORIES[task])
    (right, gloss), *wrong = rng.sample(_terms(category, split), OPTIONS)
    if split == "calibration":
        question = rng.choice(GLOSS_OF).format(term=right)
        return _item(task, right, question, [text for _, text in wrong], gloss, rng, split)
    question = rng.choice(TERM_OF).format(category=category, gloss=gloss)
    return _item(task, right, question, [name for name, _ in wrong], right, rng, split)


@cache
def _elements(split: Split) -> tuple[tuple[str, ...], ...]:
    elements = {row[2]: row for row in rows("elements.tsv")}
    return tuple(elements[name] for name in share_of("science.elements", elements, split))


def element(rng: random.Random, split: Split) -> Item:
    (number, symbol, name), *others = rng.sample(_elements(split), OPTIONS)
    names, symbols = [other[2] for other in others], [other[1] for other in others]
    if split == "calibration":
        question = rng.choice(NUMBERED).format(number=number)
        return _item("elements", name, question, names, name, rng, split)
    if rng.random() < 0.5:
        question = rng.choice(SYMBOL_OF).format(name=name)
        return _item("elements", name, question, symbols, symbol, rng, split)
    question = rng.choice(NAME_OF).format(symbol=symbol)
    return _item("elements", name, question, names, name, rng, split)


DRAWS: dict[str, Callable[[random.Random, Split], Item]] = {
    **{f"science.{task}": partial(term, task) for task in CATEGORIES},
    "science.elements": element,
}
