"""The command line in this process: what it prints and how it ends, without the seconds that its own process takes.

What depends on being a process (signals, a reader that goes away, imports) is tried with real ones.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from orchestrator.cli import main


def orchestrator(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`orchestrator ARGUMENTS` in the directory `cwd` (None: where this process is)."""
    argv, here = sys.argv, os.getcwd()
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["orchestrator", *arguments]
    code: object = 0
    try:
        if cwd is not None:
            os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = argv
        os.chdir(here)
    if not isinstance(code, int):
        code = 0 if code is None else 1
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())
