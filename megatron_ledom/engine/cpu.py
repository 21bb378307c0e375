"""Megatron without CUDA: the one place with patches, but for `wheel`.

`install()` makes megatron-core's unchanged `pretrain()` run on the CPU with gloo;
`restore()` puts every replaced object back. Nothing happens at import, and a run on a
CUDA device never calls `install()`: the tests hold both.

What is replaced, and why (measured with megatron-core 0.19.2, torch 2.13):

    torch.cuda.*              device queries, streams, events, memory and RNG calls answer for the CPU
    torch.zeros, torch.tensor, ...   `device="cuda"` is a literal in some sixty places of Megatron
    Tensor.cuda, Module.cuda  the identity
    Tensor.type               Megatron's optimizers accept parameters by the name 'torch.cuda.FloatTensor'
    megatron RNG helpers      their device is a literal too
    megatron Adam             see `adam`
    checkpoint writer         its results come through memory and not through a server process; a save in the background
                              is written by a fork of the rank: `cpu_saving` says why
    collectives of one rank   see `cpu_shortcuts`, as for the scaling of gradients
    initialize_megatron       called with allow_no_cuda=True, which `pretrain()` does not pass on

It owns no training logic: what runs afterwards is Megatron's own code.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron_ledom.engine.patching import Patches

_patches = Patches()
_replace = _patches.replace

FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "zeros_like", "ones_like", "empty_like", "full_like"),
)
"""The functions of `torch` whose `device="cuda"` and `pin_memory=True` are redirected."""


EXPECTED_WARNINGS = (
    ".*Apex (is|are) not installed.*",
    "Only transformer-engine.*",
    ".*torch.distributed is disabled, unavailable or uninitialized.*",
    "The argument order of load has been changed.*",
)
"""What Megatron and torch say of a machine without CUDA: true, expected here, and twenty lines a rank."""


def is_installed() -> bool:
    """Whether the patches are active in this process."""
    return bool(_patches)


def prepare_environment() -> None:
    """Set a CPU run's environment variables, where the user has not, and warning filters: before importing megatron.

    Dynamo would compile Megatron's small fused functions with a C++ compiler at the
    first step; eager mode starts half a minute earlier and needs none. Megatron asserts
    CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor parallelism.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def install() -> None:
    """Make Megatron run on the CPU in this process; a second call does nothing."""
    if is_installed():
        return
    prepare_environment()
    import torch._dynamo  # inspects torch functions, so it must see the originals
    import megatron.core.optimizer  # noqa: F401 - likewise; isort: skip

    # `with torch.device(...)` recognises the factory functions by a set that it builds once and keeps: built after
    # the patches it would hold the wrappers, and transformers' loading on the meta device would go wrong unnoticed.
    torch.utils._device._device_constructors()

    _patch_torch_cuda()
    _patch_factories()
    _patch_tensor()
    _patch_megatron()


def restore() -> None:
    """Put back everything that `install` replaced."""
    _patches.restore()


def use_cross_entropy(function: Callable[..., Any]) -> None:
    """Let Megatron's models compute their loss with `function`, which takes what Megatron's own takes.

    Nothing in a layer specification decides it. `restore` puts Megatron's back.
    """
    from megatron.core import tensor_parallel

    assert is_installed(), "the CPU engine is not installed"
    _replace(tensor_parallel, "vocab_parallel_cross_entropy", function)


class _Stream:
    """A CUDA stream on a machine without: work is done when it is issued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class _Event:
    """A CUDA event on a machine without; `elapsed_time` is the wall time between two records, in milliseconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_s = 0.0

    def record(self, stream: Any = None) -> None:
        import time

        self._time_s = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end._time_s - self._time_s)

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _resident_bytes(*args: Any, **kwargs: Any) -> int:
    """Resident memory of this process, where Megatron asks what CUDA has allocated."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a pseudo-file, read on the hot path
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak_resident_bytes(*args: Any, **kwargs: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _patch_torch_cuda() -> None:
    import torch

    cuda, cpu = torch.cuda, torch.device("cpu")
    properties = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=_total_memory_bytes())
    properties.multi_processor_count = os.cpu_count() or 1
    quiet = ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "set_stream", "manual_seed")
    for name in (*quiet, "manual_seed_all", "init", "_lazy_init", "ipc_collect"):
        _replace(cuda, name, _nothing)
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: cpu,  # accepted wherever Megatron passes a device on
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "get_device_name": lambda device=None: "cpu",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "memory_allocated": _resident_bytes,
        "memory_reserved": _resident_bytes,
        "max_memory_allocated": _peak_resident_bytes,
        "max_memory_reserved": _peak_resident_bytes,
        "device_memory_used": _resident_bytes,
        "memory_stats": lambda device=None: _memory_stats(),
    }
    for name, answer in answers.items():
        _replace(cuda, name, answer)
    for owner in (cuda, cuda.random):
        _replace(owner, "get_rng_state", lambda device=None: torch.get_rng_state())
        _replace(owner, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
    _replace(cuda, "Stream", _Stream)
    _replace(cuda, "Event", _Event)
    _replace(cuda.nvtx, "range_push", _nothing)
    _replace(cuda.nvtx, "range_pop", _nothing)


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_stats() -> dict[str, int]:
    """The keys that Megatron logs to TensorBoard, filled with this process's resident memory."""
    now, peak = _resident_bytes(), _peak_resident_bytes()
    stats = {f"{kind}_bytes.all.current": now for kind in ("reserved", "allocated", "active")}
    stats |= {f"{kind}_bytes.all.peak": peak for kind in ("reserved", "allocated", "active")}
    return stats | {"allocation.all.current": 0}


def _is_cuda(device: Any) -> bool:
    return getattr(device, "type", device if isinstance(device, str) else "").startswith("cuda")


def _on_cpu[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a factory function: `device="cuda"` becomes the CPU, pinned memory ordinary memory."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _patch_factories() -> None:
    import torch

    for name in FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))


def _patch_tensor() -> None:
    import torch

    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original_to(self, *("cpu" if _is_cuda(a) else a for a in args), **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    _replace(torch.Tensor, "to", to)
    _replace(torch.Tensor, "type", type_)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


def _patch_megatron() -> None:
    import megatron.core.distributed.param_and_grad_buffer as gradient_buffers
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.training.training as training
    import torch

    from megatron_ledom.engine import cpu_saving
    from megatron_ledom.engine.adam import use_torch_adam
    from megatron_ledom.engine.cpu_shortcuts import scale_tensors, without_peers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        _replace(gradient_buffers, name, without_peers(getattr(gradient_buffers, name)))
    _replace(clip_grads, "multi_tensor_scale_impl", scale_tensors)
    _replace(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    use_torch_adam(_patches)
    for owner, name, value in cpu_saving.replacements():
        _replace(owner, name, value)
    initialize = training.initialize_megatron
    _replace(training, "initialize_megatron", functools.partial(initialize, allow_no_cuda=True))
