"""Importing costs nothing and changes nothing; the base install never needs torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from adapters import make_adapter

import mergeprobe_fast as mpf

REPOSITORY = Path(__file__).parents[1]
HEAVY = (
    "torch", "pandas", "pyarrow", "scipy", "rich", "peft", "transformers", "triton", "xgboost",
)  # fmt: skip


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints; it finds the same package as this one."""
    package = str(Path(mpf.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": package},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_import_loads_and_changes_nothing():
    loaded = python(
        """
        import os, sys, threading, warnings
        before = dict(os.environ), sys.path[:], list(warnings.filters), threading.active_count()
        import mergeprobe_fast
        after = dict(os.environ), sys.path[:], list(warnings.filters), threading.active_count()
        assert before == after, "import changed the process"
        print(*sorted(sys.modules))
        """
    ).split()
    heavy = [*HEAVY, "numpy", "mergeprobe_fast._core", "mergeprobe_fast.ops"]
    assert not {m for m in loaded if m in heavy}


@pytest.mark.parametrize("use", [
    "open_zoo", "pair_features", "adapter_features", "screen", "ops", "FEATURES",
])  # fmt: skip
def test_no_heavy_import_on_the_way(tmp_path, use):
    for i in range(3):
        make_adapter(tmp_path / str(i), seed=i, dtype="BF16")
    loaded = python(
        """
        import os, sys
        import mergeprobe_fast as mpf
        before = dict(os.environ)
        use, folder = sys.argv[1:]
        if use == "ops":
            import numpy as np
            x = np.ones((4, 5), np.float32)
            mpf.ops.block_gram(x, x, [0, 4])
            mpf.ops.canonical([(x.T, x, 1.0)])
        zoo = mpf.open_zoo(folder)
        if use == "pair_features":
            mpf.pair_features(zoo)
        elif use == "FEATURES":
            assert mpf.FEATURES and mpf.CROSSWALK
        elif use == "adapter_features":
            mpf.adapter_features(zoo)
        elif use == "screen":
            from mergeprobe_fast.screening import screen
            screen(zoo)
        assert before == dict(os.environ)
        print(*sorted(sys.modules))
        """,
        use,
        str(tmp_path),
    ).split()
    assert not {m for m in loaded if m in HEAVY}
    if use == "open_zoo":
        assert "mergeprobe_fast._core" not in loaded


def test_unknown_attribute():
    with pytest.raises(AttributeError) as caught:
        _ = mpf.nonsense
    assert str(caught.value) == "module 'mergeprobe_fast' has no attribute 'nonsense'"
    assert not hasattr(mpf, "__wrapped__")


def test_every_public_name_resolves():
    assert set(dir(mpf)) == set(mpf.__all__)
    for name in mpf.__all__:
        assert getattr(mpf, name) is not None
    assert mpf.ops.block_gram.__module__ == "mergeprobe_fast.ops.gram"


def test_missing_compiled_module_is_said_every_time():
    said = python(
        """
        import sys
        sys.modules["mergeprobe_fast._core"] = None
        import numpy as np
        import mergeprobe_fast as mpf
        x = np.ones((4, 5), np.float32)
        for _ in range(2):
            try:
                mpf.ops.block_gram(x, x, [0, 4])
            except mpf.BackendError as error:
                print(error)
        print(mpf.ops.block_gram(x, x, [0, 4], backend="reference")[0, 0])
        """
    ).splitlines()
    assert len(said) == 3 and said[0] == said[1]
    assert said[0].startswith("the compiled module mergeprobe_fast._core did not load (")
    assert said[0].endswith("reinstall with a C++17 compiler present")
    assert said[2] == "400.0"


def test_bare_kernels_is_not_importable():
    if Path(mpf.__file__).parents[1] == REPOSITORY or (
        Path(mpf.__file__).parents[1] / "pyproject.toml"
    ).exists():
        pytest.skip("runs from the checkout, where the folder kernels/ lies beside the package")
    found = python(
        """
        import importlib.util, pathlib, mergeprobe_fast
        spec = importlib.util.find_spec("kernels")
        here = pathlib.Path(mergeprobe_fast.__file__).parents[1]
        print(bool(spec and spec.origin and here in pathlib.Path(spec.origin).parents))
        import mergeprobe_fast.kernels
        """
    )
    assert found == "False"
