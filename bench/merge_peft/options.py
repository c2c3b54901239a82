"""Options of the commands beside ``merge-peft``; without the libraries that these need."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`.runs.reproduce`."""
    parser.add_argument("bank", type=Path, metavar="BANK", help="a labels.parquet")
    parser.add_argument("--rows", type=int, default=3, help="how many to draw (default 3)")
    parser.add_argument("--seed", type=int, help="of the draw (default: a fresh one, printed)")
    parser.add_argument(
        "--budget-seconds", type=float, default=240,
        help="of one core with AVX-512, estimated; others take a few times as long (default 240)",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, help="folder of the base model (default: the wheel)")
    parser.add_argument("--jobs", type=int, help="processes (default: the cores available)")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Of :mod:`.results.page`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--machine", default="", help="what the runs took place on, in words")
