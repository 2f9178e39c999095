"""The live page in a real browser: it draws, follows, says what is lost, and fits a phone, in light and dark."""

from __future__ import annotations

import base64
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from monitoring.page.server import PageServer
from monitoring.report.page import write_report_page
from tests.simulated_run import SimulatedRun

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install .[dev]")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no browser: install Debian's packages chromium and chromium-driver (apt-get install chromium chromium-driver)",
        allow_module_level=True,
    )

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
PATIENCE_S = 60.0
SIZES = {"wide": (1280, 900), "narrow": (360, 780)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where screenshots are kept."""
    directory = Path(os.environ.get("ORCHESTRATOR_TEST_ARTEFACTS") or tmp_path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


class LiveRun:
    """A simulated run that trains on, in this machine's time, until stopped."""

    def __init__(self, path: Path) -> None:
        ahead = SimulatedRun(path.with_name("rehearsal"))
        self._past(ahead)
        self.run = SimulatedRun(path, now=time.time() - (ahead.now - ahead.began))
        self._past(self.run)
        self.lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    @staticmethod
    def _past(run: SimulatedRun) -> None:
        run.start()
        run.train(60)
        run.save()
        run.recover(run.lose(1))
        run.train(60)
        run.status()

    def _train(self) -> None:
        while not self._stop.wait(0.5):
            with self.lock:
                if self.run.state == "running":
                    self.run.train(1)
                self.run.now = time.time()
                self.run.status()

    def kill(self, slot: int) -> None:
        with self.lock:
            self.run.now = time.time()
            self.run.lose(slot, detect=0.0)
            self.run.status()

    def recover(self, slot: int, incarnation: int) -> None:
        with self.lock:
            self.run.now = time.time()
            incident = {"incident": "kill", "worker": slot, "incarnation": incarnation, "cause": "it died", "step": 1,
                        "at": self.run.now, "detect_seconds": 0.1}  # fmt: skip
            self.run.recover(incident, 0.2)
            self.run.now = time.time()
            self.run.status()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveRun]:
    run = LiveRun(tmp_path / "quickstart")
    yield run
    run.stop()


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("the page never got there")


def text(browser: Any, element: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", element))


def show(browser: Any, url: str, *, scheme: str = "light", size: str = "wide") -> None:
    width, height = SIZES[size]
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "narrow"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(url)


def open_page(browser: Any, url: str, **how: str) -> None:
    show(browser, url, **how)
    until(lambda: browser.execute_script("return document.body.dataset.ready"))


def screenshot(browser: Any, to: Path) -> None:
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    to.write_bytes(base64.b64decode(picture["data"]))


def complaints(browser: Any) -> list[str]:
    """What the browser's console says since last asked."""
    return [f"{entry['level']} {entry['message']}" for entry in browser.get_log("browser")]


COLOURS = """
const canvas = document.querySelector(`#${arguments[0]} canvas`);
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
const wanted = [1, 3, 5].map((at) => parseInt(accent.slice(at, at + 2), 16));
let inked = 0, columns = new Set();
for (let at = 0; at < data.length; at += 4) {
  if (data[at + 3] < 200 || wanted.some((part, n) => Math.abs(part - data[at + n]) > 11)) continue;
  inked += 1;
  columns.add((at / 4) % canvas.width);
}
return [inked, columns.size / canvas.width];
"""
"""How many pixels of a chart have the accent's colour, and in which share of its columns there are any."""


def test_charts_draw_and_follow(browser: Any, live: LiveRun) -> None:
    with PageServer(live.run.path) as server:
        open_page(browser, server.url)
        for chart in ("plot-loss", "plot-speed", "plot-world"):
            inked, share = browser.execute_script(COLOURS, chart)
            assert inked > 300, chart
            assert share > 0.5, f"the line of {chart} goes on for most of its width"
        assert "training" in text(browser, "state-text")
        step = int(text(browser, "step"))
        until(lambda: int(text(browser, "step")) > step + 2)
        browser.find_element("id", "by-step").click()
        assert browser.execute_script(COLOURS, "plot-loss")[0] > 300
        assert complaints(browser) == []


def test_a_kill_is_shown_within_two_seconds(browser: Any, live: LiveRun) -> None:
    """What the page itself measured, from the event to the frame that shows it; the best of three, for the sake of
    machines that have much else to do."""
    measured = []
    with PageServer(live.run.path) as server:
        open_page(browser, server.url)
        for slot in (2, 3, 0):
            live.kill(slot)
            latest = "document.querySelector('#timeline li[data-kind=incident]')"
            card = f"document.querySelector('.worker[data-key=\"{slot}.0\"][data-state=lost]')"
            until(lambda latest=latest: browser.execute_script(f"return {latest}?.dataset.shownAfter"))
            until(lambda card=card: browser.execute_script(f"return {card}?.dataset.shownAfter"))
            told, lost = browser.execute_script(
                f"return [{latest}.dataset.shownAfter, {card}.dataset.shownAfter].map(Number)"
            )
            measured.append(max(told, lost))
            assert f"worker {slot}" in browser.execute_script(f"return {latest}.textContent")
            assert "lost" in browser.execute_script(f"return {card}.textContent"), "said in words, not by colour alone"
            until(lambda slot=slot: f"worker {slot}" in text(browser, "notice"))
            live.recover(slot, 0)
            until(lambda: browser.execute_script("return document.getElementById('notice').hidden"))
            # The next one is another entry.
            browser.execute_script(
                "document.querySelectorAll('#timeline li').forEach((li) => { li.dataset.kind = 'old'; })"
            )
        assert min(measured) < 2.0, measured
        assert complaints(browser) == []


def test_a_lost_connection_is_said_and_comes_back(browser: Any, live: LiveRun) -> None:
    server = PageServer(live.run.path)
    port = int(server.url.rstrip("/").rpartition(":")[2])
    try:
        open_page(browser, server.url)
        server.close()
        until(lambda: "connection" in text(browser, "connection"))
        assert not browser.execute_script("return document.getElementById('connection').hidden")
        server = PageServer(live.run.path, port=port)
        step = live.run.step
        until(lambda: int(text(browser, "step")) > step)
        assert browser.execute_script("return document.getElementById('connection').hidden")
    finally:
        server.close()
    complaints(browser)  # That it could not connect is in the console.


def test_an_interrupted_run_says_so_and_an_ended_one_is_shown(browser: Any, tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run", now=time.time() - 7200.0)
    run.start()
    run.train(30)
    run.status()
    with PageServer(run.path) as server:
        open_page(browser, server.url)
        assert text(browser, "state-text") == "interrupted"
        assert "orchestrator resume" in text(browser, "notice")
        run.finish("failed", "<b>no workers</b> & no hope")
        until(lambda: text(browser, "state-text") == "failed")
        assert "<b>no workers</b> & no hope" in text(browser, "notice"), "what a run says is text"
        assert complaints(browser) == []


def test_a_page_with_a_token(browser: Any, live: LiveRun) -> None:
    token = "correct-horse-battery-staple"
    with PageServer(live.run.path, token=token) as server:
        show(browser, server.url)
        assert "token" in browser.execute_script("return document.body.textContent")
        open_page(browser, f"{server.url}?token={token}")
        assert token not in browser.current_url
        step = int(text(browser, "step"))
        until(lambda: int(text(browser, "step")) > step)
        # The refused page, and the icon that the browser asks for beside it, are in the console.
        assert [said for said in complaints(browser) if "401 (Unauthorized)" not in said] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_it_fits_and_is_kept_as_a_picture(browser: Any, live: LiveRun, artefacts: Path, scheme: str, size: str) -> None:
    live.kill(0)
    with PageServer(live.run.path) as server:
        open_page(browser, server.url, scheme=scheme, size=size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
        ground = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
        is_dark = sum(map(int, ground[4:-1].split(","))) < 200
        assert is_dark == (scheme == "dark")
        screenshot(browser, artefacts / f"page-{scheme}-{size}.png")
        assert complaints(browser) == []
    write_report_page(live.run.path, artefacts / "report.html")
    show(browser, f"file://{artefacts / 'report.html'}", scheme=scheme, size=size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
    shown = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].filter((svg) => svg.clientWidth > 0).length"
    )
    assert shown == 4, "each chart in the one of its two shapes that fits"
    screenshot(browser, artefacts / f"report-{scheme}-{size}.png")
    assert complaints(browser) == [], "its policy allows all that it needs"
