"""One HTML file that explains a screening: no network, no other files, light and dark."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from importlib import resources
from pathlib import Path

from .data import ScreenReport
from .payload import payload


def render_html(report: ScreenReport) -> str:
    """The report as the text of one HTML page, ASCII only."""
    template = resources.files(__package__).joinpath("template.html").read_text("utf-8")
    # Hashes rather than 'unsafe-inline': markup that slipped in from a name could not run.
    policy = (
        f"default-src 'none'; style-src {_sources(template, 'style')}; "
        f"script-src {_sources(template, 'script')}; base-uri 'none'; form-action 'none'"
    )
    block = json.dumps(payload(report), allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        block = block.replace(char, f"\\u{ord(char):04x}")
    parts = {
        "policy": policy,
        "title": html.escape(f"{report.zoo}: mergeprobe-fast"),
        "data": block,
    }
    page = re.sub(r"\{\{(policy|title|data)\}\}", lambda match: parts[match[1]], template)
    # Python, like a hostile file name, can hold lone surrogates; a UTF-8 file cannot.
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def write_html(path: str | os.PathLike[str], report: ScreenReport) -> None:
    """Write ``render_html(report)`` to ``path``, whole or not at all."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        with open(partial, "w", encoding="ascii", newline="\n") as file:
            file.write(render_html(report))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _sources(template: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
    digests = [hashlib.sha256(text.encode("ascii")).digest() for text in found]
    return " ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests)
