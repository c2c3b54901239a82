"""Instructions whose result a program can verify: case, marks, lists, JSON, order, counts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from mergeprobe_fast.merge_peft.tasks.item import Item, chat, closed
from mergeprobe_fast.merge_peft.tasks.words import Split, words_of

Draw = Callable[[random.Random, Split], Item]
Rewrite = Callable[[str], str]

CASES: tuple[tuple[str, str, Rewrite], ...] = (
    ('Write "{}" in capital letters.', 'Put "{}" into upper case.', str.upper),
    ('Write "{}" with a capital at the start of each word.', 'Make a title of "{}".', str.title),
    ('Write "{}" with a hyphen instead of each space.', 'Join "{}" by hyphens.',
     lambda text: text.replace(" ", "-")),
    ('Write "{}" with an underscore instead of each space.', 'Join "{}" by underscores.',
     lambda text: text.replace(" ", "_")),
    ('Write "{}" without spaces.', 'Run the words of "{}" together.',
     lambda text: text.replace(" ", "")),
)  # fmt: skip
MARKS: tuple[tuple[str, str, Rewrite], ...] = (
    ('Write "{}" inside square brackets.', 'Put square brackets around "{}".', "[{}]".format),
    ('Write "{}" inside round brackets.', 'Put round brackets around "{}".', "({})".format),
    ('Write "{}" between two stars.', 'Put a star before and after "{}".', "*{}*".format),
    ('Write "{}" and end with an exclamation mark.', 'Shout "{}" with one mark.', "{}!".format),
    ('Write "{}" and end with a question mark.', 'Ask "{}" with one mark.', "{}?".format),
    ('Write "{}" and finish with the word DONE.', 'Say "{}" and then DONE.', "{} DONE".format),
    ('Start with the word NOTE and a colon, then write "{}".', 'Mark "{}" with NOTE: in front.',
     "NOTE: {}".format),
    ('Write "{}" twice, separated by a comma.', 'Say "{0}", a comma, and "{0}" again.',
     "{0}, {0}".format),
)  # fmt: skip

GAPS = (
    "The _ is near the _.",
    "We saw a _ and a _.",
    "No _ without a _!",
    "Is the _ older than the _?",
)
OTHER_GAPS = ("One _ hides behind one _.", "Where are my _ and your _?", "Sell the _, keep the _!")


def _item(
    task: str, key: str, question: str, answer: str, split: Split, verifier: str,
    arguments: Mapping[str, Any],
) -> Item:  # fmt: skip
    return Item(
        domain="instruct",
        task=f"instruct.{task}",
        key=key,
        prompt=chat(question),
        target=closed(answer),
        kind="verify",
        check={"verifier": verifier, "arguments": arguments},
        source="calibration" if split == "calibration" else "train",
    )


def _nouns(rng: random.Random, split: Split, count: int) -> list[str]:
    return rng.sample(words_of(split).nouns, count)


def _rewriting(task: str, rewrites: tuple[tuple[str, str, Rewrite], ...]) -> Draw:
    def draw(rng: random.Random, split: Split) -> Item:
        words = words_of(split)
        phrase = f"{rng.choice(words.adjectives)} {rng.choice(words.nouns)}"
        usual, other, rewrite = rng.choice(rewrites)
        question = (other if split == "calibration" else usual).format(phrase)
        text = rewrite(phrase)
        return _item(task, phrase, question, text, split, "keeps", {"text": text})

    return draw


def bullets(rng: random.Random, split: Split) -> Item:
    nouns = _nouns(rng, split, rng.randint(2, 4))
    mark = rng.choice("*-+")
    listed = ", ".join(nouns)
    question = f'Write these words as bullet points that start with "{mark}": {listed}'
    if split == "calibration":
        question = f'One line each, with "{mark}" and a space in front: {listed}'
    answer = "\n".join(f"{mark} {noun}" for noun in nouns)
    arguments = {"texts": tuple(nouns), "mark": mark}
    return _item("bullets", listed, question, answer, split, "bullets", arguments)


def numbered(rng: random.Random, split: Split) -> Item:
    nouns = _nouns(rng, split, rng.randint(2, 4))
    listed = ", ".join(nouns)
    question = f"Write these words as a numbered list: {listed}"
    if split == "calibration":
        question = f"Number these from 1, one line each, as in 1. word: {listed}"
    answer = "\n".join(f"{place}. {noun}" for place, noun in enumerate(nouns, start=1))
    return _item("numbered", listed, question, answer, split, "numbered", {"texts": tuple(nouns)})


def json_object(rng: random.Random, split: Split) -> Item:
    words = words_of(split)
    name, thing, count = rng.choice(words.names), rng.choice(words.things), rng.randint(2, 60)
    colour = rng.choice(words.adjectives)
    fields: dict[str, Any] = {"name": name, "item": thing, "count": count, "kind": colour}
    chosen = sorted(rng.sample(list(fields), rng.randint(2, 3)), key=list(fields).index)
    fields = {field: fields[field] for field in chosen}
    listed = ", ".join(f"{field} is {value}" for field, value in fields.items())
    question = f"Write a JSON object: {listed}."
    if split == "calibration":
        question = f"Turn this into JSON with the keys {', '.join(chosen)}: {listed}."
    return _item(
        "json", listed, question, json.dumps(fields), split, "json_object", {"fields": fields}
    )


def repeated(rng: random.Random, split: Split) -> Item:
    words = words_of(split)
    choice = words.nouns + words.adjectives + words.things + words.names
    word, times = rng.choice(choice), rng.randint(2, 5)
    usual = (
        "Repeat the word {} {} times.",
        "Write the word {} exactly {} times, separated by spaces.",
        "Say the word {} {} times in a row, with spaces.",
    )
    question = rng.choice(usual).format(word, times)
    if split == "calibration":
        other = ("Let {} stand {} times on one line, and nothing else.", "Print {} {} times.")
        question = rng.choice(other).format(word, times)
    answer, arguments = " ".join([word] * times), {"word": word, "times": times}
    return _item("repeat", f"{word} x {times}", question, answer, split, "repeated", arguments)


def alphabetical(rng: random.Random, split: Split) -> Item:
    nouns = _nouns(rng, split, rng.randint(3, 4))
    listed = ", ".join(nouns)
    question = f"Sort these words from A to Z: {listed}"
    if split == "calibration":
        question = f"Put into alphabetical order, with commas: {listed}"
    answer, arguments = ", ".join(sorted(nouns)), {"words": tuple(sorted(nouns))}
    return _item(
        "alphabetical", ", ".join(sorted(nouns)), question, answer, split, "word_list", arguments
    )


def backwards(rng: random.Random, split: Split) -> Item:
    nouns = _nouns(rng, split, rng.randint(3, 5))
    listed = " ".join(nouns)
    question = f"Write these words in reverse order: {listed}"
    if split == "calibration":
        question = f"Say this from the last word to the first: {listed}"
    arguments = {"words": tuple(nouns[::-1])}
    return _item(
        "backwards", listed, question, " ".join(nouns[::-1]), split, "word_list", arguments
    )


def filled(rng: random.Random, split: Split) -> Item:
    first, second = _nouns(rng, split, 2)
    sentence = rng.choice(OTHER_GAPS if split == "calibration" else GAPS)
    question = f'Fill the gaps of "{sentence}" with {first} and {second}.'
    if split == "calibration":
        question = f'The words {first}, {second} are missing: "{sentence}"'
    text = sentence.replace("_", first, 1).replace("_", second, 1)
    return _item("fill", f"{first}, {second}", question, text, split, "keeps", {"text": text})


def picked(rng: random.Random, split: Split) -> Item:
    names = ("first", "second", "third", "last")
    nouns, place = _nouns(rng, split, len(names)), rng.randrange(len(names))
    listed = " ".join(nouns)
    question = f"Write only the {names[place]} word of: {listed}"
    if split == "calibration":
        question = f"{listed}\nWhich word is the {names[place]} here?"
    arguments = {"text": nouns[place]}
    return _item("pick", f"{listed} @ {place}", question, nouns[place], split, "says", arguments)


def counted(rng: random.Random, split: Split) -> Item:
    nouns = _nouns(rng, split, rng.randint(2, 6))
    listed = " ".join(nouns)
    question = f"How many words are there? {listed}"
    if split == "calibration":
        question = f"Count the words of this line: {listed}"
    return _item("count", listed, question, str(len(nouns)), split, "number", {"value": len(nouns)})


DRAWS: dict[str, Draw] = {
    "instruct.case": _rewriting("case", CASES),
    "instruct.marks": _rewriting("marks", MARKS),
    "instruct.bullets": bullets,
    "instruct.numbered": numbered,
    "instruct.json": json_object,
    "instruct.repeat": repeated,
    "instruct.alphabetical": alphabetical,
    "instruct.backwards": backwards,
    "instruct.fill": filled,
    "instruct.pick": picked,
    "instruct.count": counted,
}
