"""The emulated kernels and the PTX of the same sources, compiled once."""

from __future__ import annotations

import pytest
from emulation import Emulation, build_library, kernel_sources
from ptx.launches import Interpreter, build_interpreter, ptx_of


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return build_library(tmp_path_factory.mktemp("emulation"), kernel_sources())


@pytest.fixture(scope="session")
def ptx_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What nvcc writes for each `.cu` file: its stem -> PTX."""
    folder = tmp_path_factory.mktemp("ptx")
    return {source.stem: ptx_of(source, folder) for source in kernel_sources()}


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory, ptx_texts: dict[str, str]) -> Interpreter:
    return build_interpreter(list(ptx_texts.values()), tmp_path_factory.mktemp("launchers"))
