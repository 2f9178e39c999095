"""For all tests: a failure is shown when it happens, so that a run that is cut off by a time limit has told it."""

from __future__ import annotations

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
