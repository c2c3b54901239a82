"""Reports of a screening: one self-contained HTML file, and a summary for the terminal."""

from __future__ import annotations

from .data import FeatureInfo, ScreenReport
from .html import render_html, write_html
from .order import leaf_order
from .terminal import print_screen_summary, progress

__all__ = [
    "FeatureInfo",
    "ScreenReport",
    "leaf_order",
    "print_screen_summary",
    "progress",
    "render_html",
    "write_html",
]
