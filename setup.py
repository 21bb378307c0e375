"""Builds the two extensions of csrc/; the metadata is in pyproject.toml.

`megatron_ledom.ops._kernels` holds the kernels, `megatron_ledom.data._records` reads corpora. They need a C++17
compiler with OpenMP, and neither torch nor CUDA. What cannot be built the package is installed without: attention then
takes torch's path (`megatron_ledom/ops/path.py` says so), corpora are read by Python, with the same result. To see why:

    python setup.py build_ext --inplace

    LEDOM_KERNELS=required    a failure stops the installation
    LEDOM_KERNELS=none        nothing is built

The CUDA kernels are built into it where that is asked for: they take 35 seconds of CPU time, and a machine without a
GPU has no use for them. nvcc is that of CUDACXX, CUDA_HOME, PATH, or of the package nvidia-cuda-nvcc, in this order.

    LEDOM_CUDA=none           without them (the default)
    LEDOM_CUDA=auto           with them where there is nvcc and it takes them
    LEDOM_CUDA=required       without them there is no extension, and with LEDOM_KERNELS=required no installation
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "csrc/reversed_attention/cpu", "csrc/reversed_attention/cuda"
LAYERS = "csrc/layers/cpu"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
KERNELS, RECORDS = "megatron_ledom.ops._kernels", "megatron_ledom.data._records"
WITHOUT = {KERNELS: "attention will take torch's path", RECORDS: "corpora will be read by Python, more slowly"}
RECORD_SOURCES: dict[str, list[str]] = {"csrc/bindings/records.cpp": [], "csrc/records/jsonl.cpp": []}
# Each source of the kernels with flags of its own: the same kernels are compiled for several instruction sets.
SOURCES: dict[str, list[str]] = {
    "csrc/bindings/module.cpp": [],
    "csrc/bindings/layers.cpp": [],
    f"{LAYERS}/dispatch.cpp": ["-DLEDOM_X86_PATHS"] if IS_X86 else [],
    f"{LAYERS}/layers_portable.cpp": [],
    f"{CPU}/dispatch.cpp": ["-DLEDOM_X86_PATHS"] if IS_X86 else [],
    f"{CPU}/rope.cpp": [],
    f"{CPU}/attention_portable.cpp": [],
}
if IS_X86:
    for _stem in (f"{CPU}/attention", f"{LAYERS}/layers"):
        SOURCES[f"{_stem}_avx2.cpp"] = ["-mavx2", "-mfma"]
        SOURCES[f"{_stem}_avx512.cpp"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
NO_CUDA = {f"{CUDA}/nocuda.cpp": []}

Jobs = Sequence[tuple[Callable[[str], str], str]]
"""What to call with what; each gives the object file that it made."""

NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS_OF_THE_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# Machine code for A100 and H100, which their relatives run too, and PTX for what comes after.
MANY_GPUS = [f"-gencode=arch=compute_{a},code={c}" for a, c in ((80, "sm_80"), (90, "sm_90"), (80, "compute_80"))]
# TMA and wgmma: machine code that runs on Hopper alone.
HOPPER_ONLY = ["-gencode=arch=compute_90a,code=sm_90a"]


def cuda_sources() -> dict[str, list[str]]:
    """The `.cu` files and what each is compiled for: the name says which."""
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CUDA).glob("*.cu"))
    return {path: HOPPER_ONLY if path.endswith("_sm90a.cu") else MANY_GPUS for path in found}


def cuda_source_hash() -> str:
    """SHA-256 of all that decides what the CUDA kernels are: their sources, their headers and the flags."""
    digest = hashlib.sha256()
    headers = [*(ROOT / "csrc/common").glob("*.h"), *(ROOT / "csrc/reversed_attention").glob("*.h")]
    for path in sorted([*headers, *(ROOT / CUDA).glob("*")]):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    digest.update(" ".join([*NVCC_FLAGS, *MANY_GPUS, *HOPPER_ONLY]).encode())
    return digest.hexdigest()


def run_nvcc(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run nvcc without the flags that it takes from the environment: the hash of the kernels knows those here alone."""
    env = {name: text for name, text in os.environ.items() if name not in NVCC_FLAGS_OF_THE_ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and the static runtime that belongs to it."""

    nvcc: str
    version: str
    runtime: str

    @classmethod
    def find(cls) -> "Toolkit":
        """Look for nvcc where the head of this file says.

        Raises:
            FileNotFoundError: there is none, or no libcudart_static.a with it.
        """
        home = os.environ.get("CUDA_HOME")
        packages = Path(sysconfig.get_path("purelib")) / "nvidia"
        wanted = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc")]
        wanted += [str(path) for path in sorted(packages.glob("cu*/bin/nvcc"))]
        nvcc = next((path for path in wanted if path and Path(path).is_file()), None)
        if nvcc is None:
            raise FileNotFoundError("no nvcc by CUDACXX, CUDA_HOME or on PATH, and nvidia-cuda-nvcc is not installed")
        # It may be a script that calls the real one: where that one lives it says itself.
        said = run_nvcc([nvcc, "--dryrun", "-x", "cu", os.devnull])
        top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.M)
        root = Path(top[1].strip()) if top else Path(nvcc).parents[1]
        places = [root / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
        runtime = next((p / "libcudart_static.a" for p in places if (p / "libcudart_static.a").is_file()), None)
        if runtime is None:
            raise FileNotFoundError(f"no libcudart_static.a below {root}: install nvidia-cuda-runtime beside {nvcc}")
        said = run_nvcc([nvcc, "--version"])
        said.check_returncode()
        version = re.search(r"V(\d+\.\d+\.\d+)", said.stdout)
        return cls(nvcc, f"nvcc {version[1] if version else 'unknown'}", str(runtime.resolve()))


class BuildKernels(build_ext):
    """Compiles the sources side by side, and does without an extension, or the CUDA part, where that fails.

    Where there is to be none, that of an earlier build is removed: it would be taken for this one, and go into wheels.
    """

    def run(self) -> None:
        """Build; setuptools then copies into the source tree, where that is asked for."""
        self.is_in_place = bool(self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`; the object files of unchanged sources are not kept."""
        wish = os.environ.get("LEDOM_KERNELS", "auto")
        if wish == "none":
            self.say(f"{ext.name} not built, as LEDOM_KERNELS=none asks")
            self.remove_earlier(ext)
            return
        try:
            if ext.name == KERNELS:
                self.build_with_cuda(ext)
            else:
                self.link(ext, self.compile(RECORD_SOURCES), [])
        except Exception as error:  # whatever a compiler, its absence or a missing header leads to
            if wish == "required":
                raise
            self.say(f"{ext.name} NOT BUILT: {error}")
            self.say(f"{WITHOUT[ext.name]}; install a C++17 compiler with OpenMP and try again")
            self.remove_earlier(ext)

    def remove_earlier(self, ext: Extension) -> None:
        """Remove what an earlier build left where this one would have put the extension."""
        places = [Path(self.get_ext_fullpath(ext.name))]
        if self.is_in_place:
            self.inplace = True
            places.append(Path(self.get_ext_fullpath(ext.name)))
            self.inplace = False
        for path in places:
            if path.exists():
                path.unlink()
                self.say(f"removed that of an earlier build: {path}")

    def build_with_cuda(self, ext: Extension) -> None:
        """Build with the CUDA kernels where they are asked for, else without them."""
        wish = os.environ.get("LEDOM_CUDA", "none")
        if wish not in ("none", "auto", "required"):
            raise ValueError(f"LEDOM_CUDA={wish}: give none, auto or required")
        if wish != "none":
            try:
                toolkit = Toolkit.find()
                self.link(ext, self.compile_with_cuda(toolkit), [toolkit.runtime, "-ldl", "-lrt", "-lpthread"])
            except Exception as error:
                if wish == "required":
                    raise
                self.say(f"CUDA kernels NOT BUILT: {error}")
            else:
                names = ", ".join(Path(path).name for path in cuda_sources())
                self.say(f"built with CUDA by {toolkit.version} ({toolkit.nvcc}): {names}")
                return
        else:
            self.say("CUDA kernels not asked for; LEDOM_CUDA=required builds them")
        self.link(ext, self.compile(SOURCES | NO_CUDA), [])
        self.say("built for the CPU only")

    def compile_with_cuda(self, toolkit: Toolkit) -> list[str]:
        """Compile the kernels, those for GPUs too; returns the object files."""
        cuda = cuda_sources()
        macros = [f'-DLEDOM_CUDA_COMPILER="{toolkit.version}"', f'-DLEDOM_CUDA_SOURCE_HASH="{cuda_source_hash()}"']
        more = [*macros, f"-I{self.cuda_include(toolkit)}"]
        sources = {path: flags + more for path, flags in (SOURCES | {f"{CUDA}/variants.cpp": []}).items()}

        def compile_cuda(source: str) -> str:
            made = Path(self.build_temp) / f"{source}.o"
            made.parent.mkdir(parents=True, exist_ok=True)
            self.call([toolkit.nvcc, *NVCC_FLAGS, *cuda[source], "-Icsrc", "-c", source, "-o", str(made)])
            return str(made)

        return self.compile(sources, [(compile_cuda, source) for source in cuda])  # the longest come first

    def compile(self, sources: dict[str, list[str]], before: Jobs = ()) -> list[str]:
        """Do the jobs and compile every source with its own flags; returns the object files."""
        import pybind11

        include = ["csrc", pybind11.get_include(), *self.include_dirs]

        def compile_cpp(source: str) -> str:
            (made,) = self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=include, extra_postargs=FLAGS + sources[source]
            )
            return made

        jobs = [*before, *((compile_cpp, source) for source in sources)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda job: job[0](job[1]), jobs))

    @staticmethod
    def cuda_include(toolkit: Toolkit) -> str:
        """Where cuda_runtime_api.h lies."""
        for folder in (Path(toolkit.runtime).parents[1], Path(toolkit.runtime).parents[3]):
            if (folder / "include/cuda_runtime_api.h").is_file():
                return str(folder / "include")
        raise FileNotFoundError(f"no cuda_runtime_api.h near {toolkit.runtime}: install nvidia-cuda-runtime")

    @staticmethod
    def call(command: list[str]) -> None:
        """Run nvcc; what it says goes into the error where it fails."""
        print(" ".join(command), flush=True)
        done = run_nvcc(command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")

    def link(self, ext: Extension, objects: list[str], libraries: list[str]) -> None:
        """Link the object files under a temporary name, which becomes the extension's when it is complete."""
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        openmp = ["-fopenmp"] if ext.name == KERNELS else []  # whoever reads corpora is to load no more than it needs
        flags = [*libraries, *openmp, "-Wl,--exclude-libs,ALL", "-Wl,--strip-debug"]
        try:
            self.compiler.link_shared_object(objects, str(temporary), extra_postargs=flags, target_lang="c++")
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
        Extension(name, [*sources], optional=os.environ.get("LEDOM_KERNELS") != "required")
        for name, sources in ((KERNELS, SOURCES | NO_CUDA), (RECORDS, RECORD_SOURCES))
    ],
    cmdclass={"build_ext": BuildKernels},
)
