"""Build glue only: metadata is in pyproject.toml, compiler logic in CMakeLists.txt."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("MERGEPROBE_CUDA", "auto")


def find_nvcc():
    """The CUDA compiler that was named, or the one on the path; None if there is none."""
    if named := os.environ.get("CUDACXX"):
        return named
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if found := shutil.which("nvcc", path=str(Path(home, "bin"))):
                return found
    return shutil.which("nvcc")


def extensions():
    """``_core``, and ``_cuda`` where a CUDA compiler is found and MERGEPROBE_CUDA lets it."""
    if MODE not in ("auto", "on", "off"):
        raise SystemExit(f"MERGEPROBE_CUDA must be auto, on or off, got {MODE!r}")
    found = [Extension("mergeprobe_fast._core", sources=[])]
    nvcc = None if MODE == "off" else find_nvcc()
    if nvcc:
        found.append(Extension("mergeprobe_fast._cuda", sources=[], optional=MODE == "auto"))
        found[-1].nvcc = nvcc
    elif MODE == "on":
        raise SystemExit("MERGEPROBE_CUDA=on, but there is no nvcc: set CUDACXX or CUDA_HOME")
    return found


class CMakeBuild(build_ext):
    """Builds each extension as the CMake target of the same name."""

    def run(self):
        # A module left by an earlier build must not ride along into a wheel that lacks it.
        wanted = {e.name.rpartition(".")[2] for e in self.extensions}
        for folder in (Path(self.build_lib, "mergeprobe_fast"), ROOT / "mergeprobe_fast"):
            for stale in [*folder.glob("_c*.so"), *folder.glob("_c*.pyd")]:
                if stale.name.split(".")[0] not in wanted:
                    stale.unlink()
        super().run()

    def build_extension(self, ext):
        import pybind11

        target = ext.name.rpartition(".")[2]
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        out = module.parent
        module.unlink(missing_ok=True)  # one that fails leaves none behind
        work = Path(self.build_temp, target).resolve()
        work.mkdir(parents=True, exist_ok=True)
        # An isolated build remembers tools of an environment that is gone by the next one.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(work),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELEASE={out}",
            f"-DMERGEPROBE_TARGET={target}",
            *([f"-DCMAKE_CUDA_COMPILER={ext.nvcc}"] if hasattr(ext, "nvcc") else []),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        build = ["cmake", "--build", str(work), "--config", "Release", "--target", target,
                 "--parallel", str(os.cpu_count() or 1)]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(build, check=True)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            so = "; going on without it, and MERGEPROBE_CUDA=off skips it" if ext.optional else ""
            raise CompileError(f"CMake build of {ext.name} failed: {error}{so}") from error


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
