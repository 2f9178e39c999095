"""For all tests: which are run one after another, and where; and that a failure is shown when it happens, so that a run
that is cut off by a time limit has told it."""

from __future__ import annotations

import os

import pytest

SHOWN_LINES = 60


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


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a lane are run by one process, in their order: all with ranks, as their timing must not share processors
    with themselves; all with a cluster, which share one; others by file."""
    root = os.path.dirname(__file__)
    for item in items:
        room = os.path.relpath(item.path, root).split(os.sep)[0]
        lane = room if room in ("ranks", "cluster", "chaos", "browser") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(lane))
