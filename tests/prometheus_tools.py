"""Prometheus for tests: found on this machine, or Debian's package unpacked for this user; never installed or started
as a service."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

BIN_VARIABLE = "ORCHESTRATOR_PROMETHEUS_BIN"
"""A directory with `prometheus` and `promtool`, for machines without the package."""
PACKAGE = "prometheus"


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`. Skips the test where there is none and none can be had."""
    found, why = _find()
    if name not in found:
        pytest.skip(f"needs {name}: {why}; install Debian's package '{PACKAGE}' or set {BIN_VARIABLE}")
    return found[name]


@cache
def _find() -> tuple[dict[str, str], str]:
    """Both tools, and if they are not there, why not."""
    if BIN_VARIABLE in os.environ:
        directory = os.environ[BIN_VARIABLE]
        return _in(directory), f"{BIN_VARIABLE} is {directory}"
    if found := _in(None):
        return found, ""
    return _unpacked()


def _in(path: str | None) -> dict[str, str]:
    found = {name: shutil.which(name, path=path) for name in ("prometheus", "promtool")}
    return {name: place for name, place in found.items() if place is not None} if all(found.values()) else {}


def _unpacked() -> tuple[dict[str, str], str]:
    """From the package, in a cache directory of this user: takes no root, and starts no service."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator-tests" / PACKAGE
    binaries = str(home / "root" / "usr" / "bin")
    if found := _in(binaries):
        return found, ""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return {}, "this is no Debian, and nothing of that name is on PATH"
    home.mkdir(parents=True, exist_ok=True)
    fresh = home / f"root.{os.getpid()}"
    try:
        for command in (["apt-get", "download", PACKAGE], ["dpkg-deb", "-x", f"{PACKAGE}.deb", str(fresh)]):
            if command[0] == "dpkg-deb":
                packages = sorted(home.glob(f"{PACKAGE}_*.deb"))
                if not packages:
                    return {}, "apt-get download left no package"
                command[2] = str(packages[-1])
            done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=180, check=False)
            if done.returncode:
                return {}, f"{' '.join(command[:2])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        with_race = not (home / "root").exists()
        if with_race:
            fresh.replace(home / "root")
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"the package could not be unpacked: {error}"
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return _in(binaries), "the package has other files than expected"


def promtool(*arguments: str, content: str | None = None, timeout_s: float = 300) -> str:
    """Runs it, with `content` as its input. Returns what it printed; fails the test when it is not content."""
    done = subprocess.run(
        [tool("promtool"), *arguments], input=content, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return printed


class Prometheus:
    """A Prometheus that runs, and its HTTP API."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log

    def get(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer. Raises AssertionError with Prometheus's words when it is an error."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode(errors='replace')}") from error
        assert body["status"] == "success", body
        assert not body.get("warnings"), (parameters, body["warnings"])
        return body["data"]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def running_prometheus(config: Path, home: Path) -> Iterator[Prometheus]:
    """One on a free port of loopback with its data in `home`; ended by us alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = home / "prometheus.log"
    command = [
        tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={home / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    prometheus = Prometheus(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + 60
        while not prometheus.is_ready():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
