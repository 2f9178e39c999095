"""`orchestrator page` and `run --page`: the live page of a run. Reads the token's environment variable; nobody else
does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def serve(run: str, host: str, port: int, token_file: Path | None) -> None:
    """Serves the page of `run` until Ctrl-C or SIGTERM.

    Raises RunDirectoryError when there is no such run, PageError when the page cannot be served as asked.
    """
    from monitoring.page.server import PageServer
    from orchestrator.rundir import find_run

    directory = find_run(run)
    ended = threading.Event()
    token = _token(token_file)
    with PageServer(directory.path, host=host, port=port, token=token) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        print(_where(server.url, token is not None), flush=True)
        ended.wait()


@contextmanager
def page_of(run_dir: Path, wanted: bool, port: int, note: Callable[[str], None]) -> Iterator[None]:
    """The page of a run on this machine while it lasts, if it is wanted; `note` is told where it is.

    Raises PageError when the port is taken.
    """
    if not wanted:
        yield
        return
    from monitoring.page.server import PageServer

    token = _token(None)
    with PageServer(run_dir, port=port, token=token) as server:
        note(_where(server.url, token is not None))
        yield


def _token(file: Path | None) -> str | None:
    from monitoring.page.access import TOKEN_VARIABLE, token_of

    return token_of(file) if file is not None else os.environ.get(TOKEN_VARIABLE) or None


def _where(url: str, needs_token: bool) -> str:
    return f"page at {url}" + (", which asks for the token: add ?token=TOKEN once" if needs_token else "")
