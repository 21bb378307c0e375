"""Megatron as pip installs it: the patches that runs on every device need. They last as long as the process.

compile_helpers: at start rank 0 runs `make` in megatron-core's own folder and ends the process with status 1 where
that fails. The wheel holds the compiled helper but no Makefile, so with an installed megatron-core no run would start,
on GPUs neither (seen on an H200, megatron-core 0.19.2). A source checkout has the Makefile and is left alone.

Adam: see `adam`; only where there is neither Transformer Engine nor Apex.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ledom.engine.adam import use_torch_adam
from megatron_ledom.engine.patching import Patches

_patches = Patches()


def complete_installation() -> None:
    """Put right what a run from Megatron's wheel would stumble over; a second call does nothing.

    Raises:
        ImportError: there is neither a Makefile nor a compiled helper for this Python.
    """
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.optimizer as optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        use_torch_adam(_patches)
    if (
        dataset_utils.compile_helpers is _already_compiled
        or (Path(dataset_utils.__file__).parent / "Makefile").is_file()
    ):
        return
    import megatron.core.datasets.helpers_cpp  # noqa: F401 - fail here, not after the processes have met

    _patches.replace(dataset_utils, "compile_helpers", _already_compiled)


def _already_compiled() -> None:
    return None
