"""Builds the optional C++ kernels for the CPU, lesa/_cpu*.so; everything else is said in pyproject.toml.

They need torch at build time (pip install --no-build-isolation) and GCC or clang. Without either, or with LESA_NO_CPP=1
in the environment, lesa is installed without them and computes in plain torch. The library holds no Python code and
uses none of Python's interface, so one build serves every version.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Vectors are written in a language extension, whose types are no part of any interface here: hence -Wno-psabi.
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas", "-g0"]


def remove_built() -> None:
    """Remove what an earlier build left beside the package: it would be loaded, whatever becomes of this one."""
    for stale in Path("lesa").glob("_cpu*.so"):
        stale.unlink()


def left_out(reason: object) -> None:
    """Say that the kernels are not built, once: pip runs this file for the metadata too."""
    if sys.argv[1:2] in (["egg_info"], ["dist_info"], ["sdist"]):
        return
    if "editable_wheel" in sys.argv:
        remove_built()
    print(f"lesa: C++ kernels left out ({reason}); plain torch will compute on the CPU", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    """The library, or nothing and one line that says why."""
    if os.environ.get("LESA_NO_CPP", "0") not in ("", "0"):
        left_out("LESA_NO_CPP is set")
        return []
    if sys.platform not in ("linux", "darwin"):
        left_out(f"not supported on {sys.platform}")
        return []
    try:
        import torch
    except ImportError:
        left_out("torch is not installed here; install it first, then lesa with pip's --no-build-isolation")
        return []
    root = Path(torch.__file__).parent
    # OpenMP is not linked: its symbols are found in the runtime that torch brings. A second one would not know of
    # torch.set_num_threads, and its threads would compete with torch's.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return [
        Extension(
            "lesa._cpu",
            sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc").glob("*.inc")])),
            include_dirs=[str(root / "include")],
            library_dirs=[str(root / "lib")],
            libraries=["c10", "torch_cpu"],
            extra_compile_args=FLAGS + openmp,
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ]


class BuildExt(build_ext):
    """Compiles the files side by side, and lets the installation succeed where they cannot be compiled."""

    def run(self) -> None:
        if self.inplace:
            remove_built()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        compile_files = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = pool.map(lambda source: compile_files([source], **options), sources)
                return [item for part in parts for item in part]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        except Exception as error:
            left_out(error)
        finally:
            self.compiler.compile = compile_files


modules = extensions()
limited = {"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {}
setup(ext_modules=modules, cmdclass={"build_ext": BuildExt}, options=limited)
