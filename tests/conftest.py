"""Shared by all tests."""

from __future__ import annotations

import sys
from pathlib import Path

# importlib mode leaves sys.path alone; this makes `from adapters import make_adapter` work.
sys.path.insert(0, str(Path(__file__).parent))
