"""For all tests: which are run one after another, and where; and that a failure is shown when it happens, so that a run
that is cut off by a time limit has told it."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from hypothesis import settings

SHOWN_LINES = 60

# Timings never decide a test.
settings.register_profile("untimed", deadline=None, print_blob=True)
settings.load_profile("untimed")


class ShowsFailuresAtOnce:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()
            self._terminal.ensure_newline()
            self._terminal.section(f"{report.nodeid} ({report.when})", "_", red=True)
            self._terminal.write_line("\n".join(lines[-SHOWN_LINES:]))


def pytest_sessionstart(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        session.config.pluginmanager.register(ShowsFailuresAtOnce(terminal), "shows-failures-at-once")


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes that run tests each keeps to its share of the processors, and so does what its tests start:
    they do not slow each other down, and ranks that share a processor need not wake another."""
    number, count = (os.environ.get(f"PYTEST_XDIST_WORKER{part}", "") for part in ("", "_COUNT"))
    processors = sorted(os.sched_getaffinity(0))
    if number.startswith("gw") and 1 < int(count or 1) <= len(processors):
        os.sched_setaffinity(0, processors[int(number[2:]) :: int(count)])


def lane_of(nodeid: str) -> str:
    """The tests of a lane are run by one process, in their order: all with ranks, as their timing must not share
    processors with themselves; all with a cluster, which share one; chaotic runs by tens, of a night's twenty;
    others by file."""
    path = nodeid.partition("::")[0].split("/")
    room = path[1] if len(path) > 2 else ""
    if room == "chaos" and (seed := re.search(r"\[(\d+)\]$", nodeid)) is not None:
        return f"chaos {int(seed[1]) // 10}"
    return room if room in ("ranks", "cluster", "chaos", "browser") else "/".join(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lanes, whatever `--dist` says. (Its own groups are not heeded with pytest 9.2: xdist 3.8 writes them to an
    attribute that is not read any more.)"""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane_of(nodeid)

    return Lanes(config, log)
