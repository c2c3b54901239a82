"""Verifiers of IFEval's instructions (Zhou et al. 2023), where no other package is needed.

Strict: the answer as it was written. Left out are the language of an answer and its number of
sentences, which the authors leave to a language detector and a trained sentence splitter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[..., bool]


def _compares(count: int, relation: str, wanted: int) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _words(answer: str) -> list[str]:
    return re.findall(r"\w+", answer)


def _has(answer: str, text: str) -> bool:
    return re.search(text, answer, re.IGNORECASE) is not None


def _frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compares(len(re.findall(keyword, answer, re.IGNORECASE)), relation, frequency)


def _letters(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compares(answer.lower().count(letter.lower()), let_relation, let_frequency)


def _forbidden(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(_has(answer, rf"\b{word}\b") for word in forbidden_words)


def _paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Divided by ***; an empty one may stand at either end only."""
    parts = re.split(r"\s?\*\*\*\s?", answer)
    inner = [part.strip() for part in parts[1:-1]]
    count = sum(1 for part in parts if part.strip())
    return all(inner) and count == num_paragraphs


def _first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = re.split(r"\n\n", answer)
    if sum(1 for part in parts if part.strip()) != num_paragraphs or nth_paragraph > len(parts):
        return False
    words = parts[nth_paragraph - 1].split()
    opening = words[0].lstrip("'\"") if words else ""
    return re.split(r"[.,?!'\"]", opening)[0].lower() == first_word.lower()


def _postscript(answer: str, *, postscript_marker: str) -> bool:
    pattern = {
        "P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$",
    }.get(postscript_marker, rf"\s*{re.escape(postscript_marker.lower())}.*$")  # fmt: skip
    return re.search(pattern, answer.lower(), re.MULTILINE) is not None


def _bullets(answer: str, *, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def _constrained(answer: str) -> bool:
    options = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(option in answer for option in options)


def _highlights(answer: str, *, num_highlights: int) -> bool:
    single = [text for text in re.findall(r"\*[^\n*]*\*", answer) if text.strip("*").strip()]
    double = [text for text in re.findall(r"\*\*[^\n*]*\*\*", answer) if text.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def _sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter}\s?\d+\s?", answer)) - 1 >= num_sections


def _json(answer: str) -> bool:
    text = answer.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str) -> bool:
    return any(t.strip("<>").strip() for t in re.findall(r"<<[^\n]+>>", answer))


def _two(answer: str) -> bool:
    """Two different texts with ****** between them."""
    parts = answer.split("******")
    full = [part.strip() for part in parts if part.strip()]
    inner = all(part.strip() for part in parts[1:-1])
    return inner and len(full) == 2 and full[0] != full[1]


def _repeats(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(answer: str, *, capital_relation: str, capital_frequency: int) -> bool:
    capitals = [word for word in re.findall(r"[\w'-]+", answer) if word.isupper()]
    return _compares(len(capitals), capital_relation, capital_frequency)


def _quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: Mapping[str, Check] = {
    "keywords:existence": lambda answer, keywords: all(_has(answer, k) for k in keywords),
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words":
        lambda answer, num_words, relation: _compares(len(_words(answer)), relation, num_words),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders":
        lambda answer, num_placeholders: len(re.findall(r"\[.*?\]", answer)) >= num_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda answer: answer.isupper(),
    "change_case:english_lowercase": lambda answer: answer.islower(),
    "punctuation:no_comma": lambda answer: "," not in answer,
}  # fmt: skip


def instructions(answer: str, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Whether a written answer keeps to all instructions: pairs of an id and its arguments."""
    return bool(answer.strip()) and all(CHECKS[name](answer, **given) for name, given in asked)
