"""Nothing is timed while the correctness tests are red."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from harness import REPOSITORY

TESTS = ("test_gram.py", "test_canonical.py", "test_features.py", "test_merge.py",
         "test_tiles.py", "test_elementwise_methods.py", "test_regmean.py",
         "test_set_statistics.py", "test_crosswalk.py", "test_angles.py", "test_entries.py",
         "test_entry_features.py", "test_profiles.py", "test_streamed.py")  # fmt: skip
CACHE = REPOSITORY / ".benchmarks" / "gate.json"
# What the numbers depend on; bench/ may change without a new run of the tests.
PRODUCT = ("mergeprobe_fast", "csrc", "kernels", "tests", "pyproject.toml", "CMakeLists.txt")


def fingerprint() -> str:
    """Commit, uncommitted changes of the product and its tests, and the compiled module."""
    digest = hashlib.sha256(git("rev-parse", "HEAD").encode())
    digest.update(git("diff", "HEAD", "--binary", "--", *PRODUCT).encode())
    for name in git("ls-files", "--others", "--exclude-standard", "--", *PRODUCT).split("\n"):
        if name:
            digest.update(name.encode() + (REPOSITORY / name).read_bytes())
    for path in sorted((REPOSITORY / "mergeprobe_fast").glob("_core*.so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def git(*arguments: str) -> str:
    """Output of a git command in the repository, "" when it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else ""


def refusal() -> str | None:
    """Why nothing may be timed, or None. A green run is remembered until the product changes."""
    key = fingerprint()
    if CACHE.exists() and json.loads(CACHE.read_text()).get("green") == key:
        return None
    present = [f"tests/{t}" for t in TESTS if (REPOSITORY / "tests" / t).exists()]
    if not present:
        return f"none of {', '.join(TESTS)} exists"
    print(f"gate: pytest {' '.join(present)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:benchmark", *present],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return f"the correctness tests are red:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    if fingerprint() != key:
        return "the product changed while its tests ran"
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.write_text(json.dumps({"green": key, "tests": present}))
    return None


if __name__ == "__main__":
    reason = refusal()
    print(reason or f"gate: green ({Path(CACHE).relative_to(REPOSITORY)})")
    raise SystemExit(1 if reason else 0)
