"""Megatron from its wheel: the one patch that runs on every device need.

At start rank 0 calls `compile_helpers`, which runs `make` in megatron-core's own folder and ends the process with
status 1 where that fails. The wheel holds the compiled helper but no Makefile, so with an installed megatron-core no
run would start, on GPUs neither (seen on an H200, megatron-core 0.19.2). A source checkout has the Makefile and is
left alone.
"""

from __future__ import annotations

from pathlib import Path


def use_compiled_helpers() -> None:
    """Let Megatron take the helper that its wheel brings; does nothing where there is a Makefile.

    Raises:
        ImportError: there is neither a Makefile nor a compiled helper for this Python.
    """
    import megatron.core.datasets.utils as dataset_utils

    if (Path(dataset_utils.__file__).parent / "Makefile").is_file():
        return
    import megatron.core.datasets.helpers_cpp  # noqa: F401 - fail here, not after the processes have met

    dataset_utils.compile_helpers = _already_compiled


def _already_compiled() -> None:
    return None
