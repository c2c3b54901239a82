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
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
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
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        build = ["cmake", "--build", str(work), "--config", "Release", "--target", target,
                 "--parallel", str(os.cpu_count() or 1)]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(build, check=True)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            raise CompileError(f"CMake build of {ext.name} failed: {error}") from error


setup(
    ext_modules=[Extension("mergeprobe_fast._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
