"""Front of the speed suites: python bench/speed/run.py [--quick] [--only SUITE] [--device cuda]

Runs pytest on this folder; anything else on the command line goes to pytest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

SUITES = (
    "gram", "growth", "everyday", "screen", "merge", "operators", "sets", "entries", "angles",
    "metrics", "peers", "large_rank", "device_gram", "device_merge", "device_canonical",
    "device_signs", "device_screen", "device_families",
)  # fmt: skip
HERE = Path(__file__).resolve().parent


def main() -> int:
    """The exit code of pytest: 0 measured, 1 a result was wrong, 3 the gate is red."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small problems, under a minute")
    parser.add_argument("--only", choices=SUITES, action="append", help="may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="cuda: the suites device_..., by events")  # fmt: skip
    parser.add_argument("--no-gate", action="store_true", help="rows say gated: false")
    parser.add_argument("--results", type=Path, help="default: bench/results/<cpu>/speed.jsonl")
    options, rest = parser.parse_known_args()
    arguments = [str(HERE), f"--rootdir={HERE.parents[1]}", "--benchmark-sort=mean",
                 "--benchmark-columns=min,median,max,rounds", "-q"]  # fmt: skip
    arguments += ["--quick"] * options.quick + ["--no-gate"] * options.no_gate
    arguments += ["--device", options.device]
    for suite in options.only or ():
        arguments += ["--only", suite]
    if options.results:
        arguments += ["--results", str(options.results)]
    return int(pytest.main([*arguments, *rest]))


if __name__ == "__main__":
    sys.exit(main())
