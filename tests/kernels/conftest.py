"""The emulated kernels, compiled once."""

from __future__ import annotations

import pytest
from emulation import Emulation, build_library, kernel_sources


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return build_library(tmp_path_factory.mktemp("emulation"), kernel_sources())
