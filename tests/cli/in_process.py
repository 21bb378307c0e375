"""A tool run inside the tests' own process: the code of the command line without the seconds of its imports."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from megatron_ledom.errors import run_cli
from megatron_ledom.testing import REPOSITORY


def run_in_process(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Do what `megatron_ledom.testing.run_tool` does; an exception that would be a traceback there is raised here."""
    main = runpy.run_path(str(REPOSITORY / "tools" / tool))["main"]
    argv, out, err = [tool, *map(str, arguments)], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            run_cli(main)
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())
