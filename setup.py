"""Builds the native module with CMake and ninja; needs neither torch nor a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None or shutil.which("ninja") is None:
            sys.exit("building llmfp4_kernels needs cmake and ninja on PATH (pip install cmake ninja)")
        configure = [
            cmake, "-G", "Ninja", str(ROOT),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]  # fmt: skip
        architectures = os.environ.get("LLMFP4_CUDA_ARCHITECTURES")  # such as "90", or "" for no CUDA kernels
        option = "-ULLMFP4_CUDA_ARCHITECTURES"  # CMakeLists.txt's default, not what an earlier build was told
        configure.append(option if architectures is None else f"{option.replace('-U', '-D')}={architectures}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run(configure, cwd=build, check=True)
            subprocess.run([cmake, "--build", ".", "-j", jobs], cwd=build, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"the native build failed ({error}); it needs a C++17 compiler such as g++ 9, named by CXX or on PATH"
            )


setup(ext_modules=[Extension("llmfp4_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
