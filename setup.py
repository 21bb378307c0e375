"""Builds `megatron_ledom.ops._kernels`, the kernels of csrc/; the metadata is in pyproject.toml.

The extension needs a C++17 compiler with OpenMP, and neither torch nor CUDA. Where it cannot be built the package is
installed without it, and attention takes torch's path (`megatron_ledom/ops/path.py` says so). To see why:

    python setup.py build_ext --inplace

    LEDOM_KERNELS=required    a failure stops the installation
    LEDOM_KERNELS=none        nothing is built
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = "csrc/reversed_attention/cpu"
LAYERS = "csrc/layers/cpu"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
# Each source with the flags that only it gets: the same kernels are compiled for several instruction sets.
SOURCES: dict[str, list[str]] = {
    "csrc/bindings/module.cpp": [],
    "csrc/bindings/layers.cpp": [],
    f"{LAYERS}/dispatch.cpp": ["-DLEDOM_X86_PATHS"] if IS_X86 else [],
    f"{LAYERS}/layers_portable.cpp": [],
    f"{KERNELS}/dispatch.cpp": ["-DLEDOM_X86_PATHS"] if IS_X86 else [],
    f"{KERNELS}/rope.cpp": [],
    f"{KERNELS}/attention_portable.cpp": [],
}
if IS_X86:
    for _stem in (f"{KERNELS}/attention", f"{LAYERS}/layers"):
        SOURCES[f"{_stem}_avx2.cpp"] = ["-mavx2", "-mfma"]
        SOURCES[f"{_stem}_avx512.cpp"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]


class BuildKernels(build_ext):
    """Compiles the sources side by side, and does without the extension where that fails."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`; the object files of unchanged sources are not kept."""
        wish = os.environ.get("LEDOM_KERNELS", "auto")
        if wish == "none":
            self.say("not built, as LEDOM_KERNELS=none asks")
            return
        try:
            self.link(ext, self.compile())
        except Exception as error:  # whatever a compiler, its absence or a missing header leads to
            if wish == "required":
                raise
            self.say(f"NOT BUILT: {error}")
            self.say("attention will take torch's path; install a C++17 compiler with OpenMP and try again")

    def compile(self) -> list[str]:
        """Compile every source with its own flags; returns the object files."""
        import pybind11

        include = ["csrc", pybind11.get_include(), *self.include_dirs]

        def compile_one(source: str) -> str:
            (made,) = self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=include, extra_postargs=FLAGS + SOURCES[source]
            )
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, SOURCES))

    def link(self, ext: Extension, objects: list[str]) -> None:
        """Link the object files under a temporary name, which becomes the extension's when it is complete."""
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.compiler.link_shared_object(
                objects, str(temporary), extra_postargs=["-fopenmp", "-Wl,--exclude-libs,ALL"], target_lang="c++"
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        """What was built: nothing, where it failed."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def say(self, text: str) -> None:
        """Print a line that survives pip's filter where pip shows anything (`pip install -v`)."""
        print(f"megatron_ledom kernels: {text}", flush=True)


setup(
    ext_modules=[
        Extension("megatron_ledom.ops._kernels", list(SOURCES), optional=os.environ.get("LEDOM_KERNELS") != "required")
    ],
    cmdclass={"build_ext": BuildKernels},
)
