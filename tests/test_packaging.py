"""What is shipped: built once per session from a copy of the tracked files, without network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, which pytest itself needs there
    import tomli as tomllib

REPO = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NEEDED = ("build", "setuptools", "wheel", "pybind11", "cmake", "ninja")

pytestmark = pytest.mark.packaging


def environment(**changes: str) -> dict[str, str]:
    """No network, no checkout on the path, the venv's own cmake and ninja first, no CUDA."""
    set_here = ("PYTHON", "PIP_", "CMAKE", "CUDA", "MERGEPROBE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(set_here)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}
    env["MERGEPROBE_CUDA"] = "off"
    return env | changes


def run(*command: str | Path, cwd: Path, **changes: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(**changes), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def source_files() -> list[str]:
    """What a fresh clone with the present changes would hold."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [name for name in done.stdout.split("\0") if name and (REPO / name).is_file()]


def packages_of(tree: Path) -> set[str]:
    """The rule: every folder with an ``__init__.py`` below these three."""
    found = {
        ".".join(path.parent.relative_to(tree).parts)
        for path in (tree / "mergeprobe_fast").rglob("__init__.py")
    }
    for top in (tree / "kernels", tree / "bench" / "merge_peft"):
        found |= {
            ".".join(("mergeprobe_fast", *path.parent.relative_to(top.parent).parts))
            for path in top.rglob("__init__.py")
        }
    return found


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in NEEDED:
        pytest.importorskip(name, reason="in the test extra")
    copy = tmp_path_factory.mktemp("packaging") / "source"
    for name in source_files():
        if name.startswith("examples/zoo/"):
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def built(tree: Path) -> tuple[Path, Path]:
    """(sdist, wheel). The wheel is built from the sdist alone, as ``build`` does by default."""
    out = tree.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree.parent)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def site(built: tuple[Path, Path]) -> Path:
    """A folder into which pip installed the wheel."""
    target = built[1].parent.parent / "site"
    run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", target,
        built[1], cwd=target.parent,
    )  # fmt: skip
    return target


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_list_of_packages_is_the_tree(tree):
    project = tomllib.loads((tree / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == packages_of(tree)
    folders = {p.parent for p in (tree / "mergeprobe_fast").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders), "a folder without init"


def test_what_building_needs_is_what_the_tests_need(tree):
    project = tomllib.loads((tree / "pyproject.toml").read_text())
    extra = {
        re.split(r"[^A-Za-z0-9._-]", line)[0]
        for line in project["project"]["optional-dependencies"]["test"]
    }
    assert set(NEEDED) <= extra, "pip install .[test] must be enough to run this file"


def test_the_version_is_said_once(tree, built):
    import mergeprobe_fast

    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    version = project.get("version", mergeprobe_fast.__version__)
    assert version == mergeprobe_fast.__version__
    assert f"-{version}-" in built[1].name and built[0].name.endswith(f"-{version}.tar.gz")


def test_the_wheel_holds_the_packages_and_nothing_else(tree, built):
    expected = {f"mergeprobe_fast/_core{SUFFIX}", "mergeprobe_fast/py.typed"}
    for source, prefix in (
        ("mergeprobe_fast", ""), ("kernels", "mergeprobe_fast/"),
        ("bench/merge_peft", "mergeprobe_fast/"),
    ):  # fmt: skip
        top = (tree / source).parent
        for path in (tree / source).rglob("*"):
            data = path.parent.name == "data" and path.is_file()
            if path.suffix in (".py", ".html", ".pyi") or data:
                expected.add(prefix + path.relative_to(top).as_posix())
    assert wheel_files(built[1]) == expected
    assert "mergeprobe_fast/report/template.html" in expected


def test_the_wheel_carries_its_licence_and_command(built):
    with zipfile.ZipFile(built[1]) as archive:
        info = {PurePosixPath(n).name: n for n in archive.namelist() if ".dist-info/" in n}
        assert "LICENSE" in info
        assert "mergeprobe-fast = mergeprobe_fast.cli:main" in archive.read(
            info["entry_points.txt"]
        ).decode()
        assert archive.read(info["top_level.txt"]).decode().split() == ["mergeprobe_fast"]
        metadata = archive.read(info["METADATA"]).decode()
    assert "Requires-Dist: numpy" in metadata
    assert "py3-none-any" not in built[1].name, "it holds compiled code"


def test_the_sdist_holds_what_a_build_and_a_test_need(tree, built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"}
    for folder in ("csrc", "kernels", "bench/merge_peft", "mergeprobe_fast", "tests"):
        wanted |= {
            p.relative_to(tree).as_posix() for p in (tree / folder).rglob("*") if p.is_file()
        }
    assert wanted <= names, sorted(wanted - names)
    built_files = [n for n in names if n.endswith((".so", ".pyd", ".pyc")) or "build/" in n]
    assert built_files == []
    assert names & {"README.md"} == {p.name for p in [tree / "README.md"] if p.exists()}


PROBE = """
import importlib.util, sys
import mergeprobe_fast as mpf
import mergeprobe_fast.kernels, mergeprobe_fast.ops, mergeprobe_fast.cli
print(mpf.__file__)
print(mergeprobe_fast.kernels.__file__)
print(mpf._native.core().__file__)
bare = importlib.util.find_spec("kernels")  # another project of that name may be installed
print(bare and (bare.origin or list(bare.submodule_search_locations)))
"""


def test_the_installed_wheel_works(site, tmp_path):
    """From a folder far from the checkout, with this site first and the venv's packages behind."""
    lines = run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(site)).split("\n")
    package = site / "mergeprobe_fast"
    assert lines[0] == str(package / "__init__.py")
    assert lines[1] == str(package / "kernels" / "__init__.py")
    assert lines[2] == str(package / f"_core{SUFFIX}")
    assert str(site) not in lines[3], "a bare 'kernels' would shadow the project of that name"
    script = site / "bin" / "mergeprobe-fast"
    shown = run(script, "doctor", cwd=tmp_path, PYTHONPATH=str(site))
    assert re.search(r"backend cpu +on", shown)


def test_the_installed_wheel_screens_and_merges(site, tmp_path):
    from adapters import make_zoo

    make_zoo(tmp_path / "zoo", 3)
    for command in ("screen", "merge"):
        run(
            sys.executable, "-m", "mergeprobe_fast", command, "zoo", "--out", command,
            cwd=tmp_path, PYTHONPATH=str(site),
        )  # fmt: skip
    assert (tmp_path / "screen" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "merge" / "adapter_model.safetensors").is_file()


def test_an_editable_install_works(tree, built, tmp_path):
    """In a virtual environment of its own; kernels are found and do not leak as a bare name."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # Everything that is installed here except ourselves, whose normal install would come first.
    behind = tmp_path / "behind"
    behind.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "mergeprobe" not in path.name and path.suffix != ".pth":
            (behind / path.name).symlink_to(path)
    (own,) = (venv / "lib").glob("python*/site-packages")
    (own / "behind.pth").write_text(f"{behind}\n")
    run(
        python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", tree,
        cwd=tmp_path,
    )  # fmt: skip
    lines = run(python, "-c", PROBE, cwd=tmp_path).split("\n")
    assert lines[0] == str(tree / "mergeprobe_fast" / "__init__.py")
    assert lines[1] == str(tree / "kernels" / "__init__.py")
    assert Path(lines[2]).name == f"_core{SUFFIX}"
    assert str(tree) not in lines[3]
    assert re.search(r"backend cpu +on", run(venv / "bin" / "mergeprobe-fast", "doctor", cwd=venv))


def test_a_stale_module_does_not_ride_along(tree, built, tmp_path):
    """What an earlier build left in the source tree is not in the wheel (checked on the rule)."""
    script = """
import sys; sys.argv = ["setup.py", "--name"]
import setup
from setuptools.dist import Distribution
d = Distribution({"name": "x", "ext_modules": []})
c = setup.CMakeBuild(d); c.initialize_options(); c.build_lib = sys.path[0]; c.extensions = []
c.run()
"""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "examples", "tests"))
    stale = copy / "mergeprobe_fast" / f"_cuda{SUFFIX}"
    stale.write_bytes(b"old")
    run(sys.executable, "-c", script, cwd=copy, PYTHONPATH=str(copy))
    assert not stale.exists()


def python_in(tree: Path, script: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a script beside setup.py, which sees no nvcc but the one that CUDACXX names."""
    own = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(tree)} | changes
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['setup.py', '--name']\n{script}"],
        cwd=tree, env=environment(**own), text=True, capture_output=True, timeout=300,
    )  # fmt: skip


def test_the_cuda_module_is_built_where_it_is_wanted_and_there_is_a_compiler(tree):
    script = "import setup; print([(e.name, bool(e.optional)) for e in setup.extensions()])"
    core, cuda = "('mergeprobe_fast._core', False)", "('mergeprobe_fast._cuda', {})"
    for changes, extensions in (
        ({"MERGEPROBE_CUDA": "auto"}, [core]),
        ({"MERGEPROBE_CUDA": "auto", "CUDACXX": "nvcc"}, [core, cuda.format(True)]),
        ({"MERGEPROBE_CUDA": "on", "CUDACXX": "nvcc"}, [core, cuda.format(False)]),
        ({"MERGEPROBE_CUDA": "off", "CUDACXX": "nvcc"}, [core]),
    ):
        done = python_in(tree, script, **changes)
        assert done.stdout.splitlines()[-1] == f"[{', '.join(extensions)}]", done.stderr
    for mode, text in (
        ("on", "MERGEPROBE_CUDA=on, but there is no nvcc: set CUDACXX or CUDA_HOME"),
        ("yes", "MERGEPROBE_CUDA must be auto, on or off, got 'yes'"),
    ):
        done = python_in(tree, script, MERGEPROBE_CUDA=mode)
        assert done.returncode == 1 and done.stderr.splitlines() == [text]


def test_a_broken_cuda_compiler_costs_the_cuda_module_and_no_more(tree, tmp_path):
    """Automatic: said aloud, and nothing of an earlier build is left; asked for: an error."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "examples", "tests"))
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    script = """
import setup
from setuptools.dist import Distribution
c = setup.CMakeBuild(Distribution({"name": "x", "ext_modules": setup.extensions()[1:]}))
c.finalize_options(); c.inplace = True; c.get_ext_fullpath = lambda name: "MODULE"
c.run()
"""
    stale = copy / f"_cuda{SUFFIX}"
    for mode, code in (("auto", 0), ("on", 1)):
        stale.write_bytes(b"old")
        done = python_in(
            copy, script.replace("MODULE", str(stale)), MERGEPROBE_CUDA=mode, CUDACXX=str(broken),
            PATH=os.environ["PATH"],
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "CMake build of mergeprobe_fast._cuda failed" in said and not stale.exists()
        assert ("going on without it" in said) == (mode == "auto")
