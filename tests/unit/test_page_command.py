"""`orchestrator page` and the page of `run --page`, from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from monitoring.page.access import TOKEN_VARIABLE, PageError
from orchestrator.cli.page import page_of
from tests.simulated_run import SimulatedRun

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123"


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    simulated = SimulatedRun(tmp_path / "run", steps=20)
    simulated.start()
    simulated.train(20)
    simulated.finish()
    return simulated


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "page", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE} | more


def test_it_serves_an_ended_run_until_it_is_told_to_end(run: SimulatedRun) -> None:
    with subprocess.Popen(
        command(str(run.path)), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.removeprefix("page at ").strip()
        assert url.startswith("http://127.0.0.1:"), line
        state = json.loads(urllib.request.urlopen(f"{url}api/state", timeout=30).read())
        assert (state["status"]["life"], state["status"]["step"]) == ("finished", 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--host", "0.0.0.0"), TOKEN_VARIABLE),
        (("--host", "0.0.0.0", "--token-file", "no-such-file"), "no-such-file cannot be read"),
        (("--host", "no such host", "--token-file", __file__), "open to its group and everybody; chmod 600"),
    ],
)
def test_what_it_cannot_do_is_one_clear_error(run: SimulatedRun, arguments: tuple[str, ...], expected: str) -> None:
    done = subprocess.run(
        command(str(run.path), *arguments), capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_host_that_is_not_here_is_refused(run: SimulatedRun) -> None:
    from monitoring.page.server import PageServer

    for host in ("203.0.113.1", "a host that cannot be"):
        with pytest.raises(PageError, match=f"cannot be served on {host}"):
            PageServer(run.path, host=host, token=TOKEN)


def test_the_page_of_a_run_lasts_as_long_as_the_run(run: SimulatedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    notes: list[str] = []
    with page_of(run.path, True, 0, notes.append):
        url = notes[0].removeprefix("page at ").partition(",")[0]
        assert TOKEN not in notes[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}api/state", timeout=30)
        request = urllib.request.Request(f"{url}api/state", headers={"Authorization": f"Bearer {TOKEN}"})
        assert json.loads(urllib.request.urlopen(request, timeout=30).read())["status"]["step"] == 20
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url, timeout=5)
    with page_of(run.path, False, 0, notes.append):
        assert len(notes) == 1, "nothing is served that nobody asked for"
