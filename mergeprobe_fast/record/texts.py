"""Texts of a domain: from a file to token ids. Bad lines are refused by number."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.finding import text as valid_text
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.calibration_json import is_domain_name
from mergeprobe_fast.io.strict_json import Bad

FORMS = ("text", "prompt", "messages", "input_ids")
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Texts:
    """The token ids of one domain."""

    name: str
    source: str  # name of the data file
    sha256: str  # of its bytes
    sequences: tuple[np.ndarray, ...]  # int64 (length,) each
    cut: int  # how many were longer than the limit
    loss: str  # "completion" where every line has a prompt and a completion, else "all"
    starts: tuple[int, ...]  # of each, its first token that is a label: 1 or more

    def labelled(self, index: int) -> int:
        """How many tokens of a sequence are labels."""
        return len(self.sequences[index]) - self.starts[index]


def data_arguments(arguments: Iterable[str]) -> dict[str, str]:
    """``["math=a/b.jsonl", "code.jsonl"]`` as ``{"math": "a/b.jsonl", "code": "code.jsonl"}``.

    Without ``NAME=`` the name is that of the file. Raises ``InputError`` for a name given twice.
    """
    data: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            name, path = Path(argument).stem, argument
        if name in data:
            raise InputError(f"domain {name!r} is given twice", path=path)
        if not path:
            raise InputError(f"domain {name!r} has no file", key=argument)
        data[name] = path
    return data


def check_domains(names: Iterable[str]) -> None:
    """Raise ``InputError`` for a name that is no file name, or two that differ only in case."""
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not is_domain_name(name):
            reason = "is no name for a domain: it names a file; use letters, digits and . _ + -"
            raise InputError(reason, key=ascii(name))
        if name.casefold() in seen:
            raise InputError(f"is the same file name as {seen[name.casefold()]!r}", key=name)
        seen[name.casefold()] = name
    if not seen:
        raise InputError("no domain is given")


def read_texts(
    name: str,
    path: str | os.PathLike[str],
    tokenizer: Callable[[], Any],
    vocabulary: int,
    *,
    max_length: int,
    max_sequences: int | None,
    least: int,
    seed: int,
    labelled: bool = False,
) -> Texts:
    """Read and tokenise the data of one domain.

    ``.jsonl`` has one object a line, in one of four forms; other keys do not matter:
    ``{"text"}``; ``{"prompt", "completion"}``, tokenised as one text with nothing in between;
    ``{"messages"}``, through the tokenizer's chat template; ``{"input_ids"}``, as they are.
    ``.txt`` has texts separated by blank lines. ``tokenizer()`` gives a transformers tokenizer and
    is called when there is text; special tokens are what it adds by itself.

    Where every line of the file has a prompt and a completion, only tokens of completions are
    labels of a loss; else all but the first of a sequence are. A token that holds characters of
    both is one of the completion. With ``labelled`` every sequence must have a label.

    Of more than ``max_sequences``, that many are drawn with the seed. Sequences are cut to
    ``max_length`` tokens. Raises ``InputError`` naming file and line, also for fewer than
    ``least`` tokens.
    """
    path = Path(path)
    read = {".jsonl": _json_lines, ".txt": _paragraphs}.get(path.suffix.lower())
    if read is None:
        raise InputError("is neither .jsonl (an object a line) nor .txt (blank lines)", path=path)
    digest = hashlib.sha256()
    try:
        items = list(read(path, digest))
    except OSError as error:
        raise strict_json.unreadable(path, error) from error
    if not items:
        raise InputError("is empty", path=path)
    completions = all("prompt" in item for _, item in items)
    if max_sequences is not None and len(items) > max_sequences:
        rng = np.random.default_rng([seed, 0, *name.encode("utf-8")])
        items = [items[i] for i in np.sort(rng.choice(len(items), max_sequences, replace=False))]
    sequences, starts, cut = [], [], 0
    for line, item in items:
        try:
            ids = _token_ids(item, tokenizer, vocabulary)
            if len(ids) < least:
                raise Bad(f"has {len(ids)} tokens, {least} or more are needed")
            prompt = _prompt_tokens(ids, item, tokenizer()) if completions else 0
            start = min(max(prompt, 1), len(ids), max_length)
            if labelled and start == min(len(ids), max_length):
                what = "of its completion" if completions else "that is a label"
                raise Bad(f"has no token {what} among its first {max_length}")
        except Bad as bad:
            raise _line_error(path, line, bad) from None
        cut += len(ids) > max_length
        sequences.append(np.array(ids[:max_length], np.int64))
        starts.append(start)
    loss = "completion" if completions else "all"
    return Texts(
        name, valid_text(path.name), digest.hexdigest(), tuple(sequences), cut, loss, tuple(starts)
    )  # fmt: skip


def _line_error(path: Path, line: int, bad: Bad) -> InputError:
    where = f"line {line}" if bad.key is None else f"line {line}: {bad.key}"
    return InputError(bad.reason, path=path, key=where)


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb", buffering=_BLOCK) as file:
        for number, raw in enumerate(file, 1):
            digest.update(raw)
            yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def _json_lines(path: Path, digest: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in _lines(path, digest):
        if raw.isspace():
            continue
        try:
            item = strict_json.parse(raw, "the line")
            _check_form(item)
        except Bad as bad:
            raise _line_error(path, number, bad) from None
        yield number, item


def _paragraphs(path: Path, digest: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    lines: list[str] = []
    first = 1
    for number, raw in _lines(path, digest):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = Bad(f"is not UTF-8: {error.reason} at byte {error.start}")
            raise _line_error(path, number, bad) from None
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, {"text": "".join(lines).rstrip("\r\n")}
            lines = []
    if lines:
        yield first, {"text": "".join(lines).rstrip("\r\n")}


def _check_form(item: dict[str, Any]) -> None:
    forms = [form for form in FORMS if form in item]
    if len(forms) != 1:
        found = " and ".join(forms) or "none"
        raise Bad(f"needs text, prompt and completion, messages or input_ids, one of them: {found}")
    if forms == ["prompt"] and "completion" not in item:
        raise Bad("has a prompt without a completion")
    texts = {"text": ["text"], "prompt": ["prompt", "completion"]}.get(forms[0], [])
    for key in texts:
        if not isinstance(item[key], str):
            raise Bad("is not a text", key)
    if forms == ["messages"] and not _are_messages(item["messages"]):
        raise Bad("is not a list of {role, content}", "messages")
    if forms == ["input_ids"] and not _are_ids(item["input_ids"]):
        raise Bad("is not a list of token ids", "input_ids")


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all("content" in m for m in value)
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _token_ids(item: dict[str, Any], tokenizer: Callable[[], Any], vocabulary: int) -> list[int]:
    if "input_ids" in item:
        ids = item["input_ids"]
    elif "messages" in item:
        # The template writes the special tokens itself.
        ids = _encode(tokenizer(), _chat(tokenizer(), item["messages"]), special=False)
    else:
        text = item["text"] if "text" in item else item["prompt"] + item["completion"]
        ids = _encode(tokenizer(), text, special=True)
    if ids and max(ids) >= vocabulary:
        raise Bad(f"token id {max(ids)} is outside the vocabulary of {vocabulary}")
    return ids


def _prompt_tokens(ids: list[int], item: dict[str, Any], tokenizer: Any) -> int:
    """How many tokens a text begins with that hold nothing of its completion."""
    prompt = item["prompt"]
    if getattr(tokenizer, "is_fast", False):
        # Not those of the prompt alone: its last line break may be cut otherwise before a word.
        encoded = tokenizer(prompt + item["completion"], verbose=False, return_offsets_mapping=True)
        ends = (end for _, end in encoded["offset_mapping"])
        return next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    # Which characters a token holds is not known: as far as the prompt alone gives the same ones.
    alone = _encode(tokenizer, prompt, special=True)
    return next(
        (i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b),
        min(len(alone), len(ids)),
    )


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False: that a text is longer than the model's limit is ours to say.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise Bad("the tokenizer has no chat template", "messages")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program: it raises what it likes
        raise Bad(f"the chat template refuses it: {error}", "messages") from None
