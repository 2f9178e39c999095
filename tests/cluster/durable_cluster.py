"""A Ray cluster on this machine whose head keeps its tables on disk, so that its GCS may be lost and started again.

Either the GCS alone is lost, or all of a head that is started by the commands of cluster.yaml. Everything has its own
temporary directory, ports and token; all of its processes carry a mark and are ended by that alone.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from orchestrator.runtime import reaper
from tests.cluster.conftest import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]
STORE_BYTES = 80_000_000


class DurableCluster:
    """A head without processors and `nodes` workers' nodes; its GCS keeps its tables in a directory if `durable`."""

    def __init__(self, *, durable: bool = True, **settings: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="orch-gcs-", dir="/tmp"))
        self.port = _free_port()
        self.tables = self.home / "tables"
        self._token = self.home / "token"
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)
        self._settings = dict(settings)
        if durable:
            self._settings |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.tables)}

    def start(self, nodes: int = 1, cpus: int = 4) -> None:
        self.start_head()
        for _ in range(nodes):
            self.start_node(cpus)

    def start_node(self, cpus: int = 4) -> None:
        self._ray_start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}")

    def raylets(self) -> set[int]:
        """Their processes."""
        return {process.pid for process in self._processes("raylet")}

    def start_head(self) -> None:
        self._ray_start("--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false",
                        f"--temp-dir={self.home / 'ray'}")  # fmt: skip

    def start_head_of(self, launcher: Path) -> None:
        """By the commands of a launcher file: with ports and directories of its own."""
        programs = self.home / "bin"
        programs.mkdir()
        (programs / "ray").write_text(
            "#!/bin/bash\n"
            'if [ "$1" = stop ]; then exit 0; fi\n'  # it would end the Rays of others, too
            'if [ "$1" != start ]; then exec ray.real "$@"; fi\n'
            # Of a head that is gone: `ray start` would take the raylets of other nodes, which are elsewhere, for it.
            f"rm -f {self.home}/ray/ray_current_cluster\n"
            f'exec ray.real "$@" --num-cpus=0 --include-dashboard=false --temp-dir={self.home}/ray '
            f"--node-ip-address=127.0.0.1 --object-store-memory={STORE_BYTES} "
            f"--dashboard-agent-listen-port={_free_port()} --metrics-export-port={_free_port()}\n"
        )
        (programs / "ray").chmod(0o755)
        (programs / "ray.real").symlink_to(Path(sys.executable).parent / "ray")
        environment = self._environment() | {"HOME": str(self.home), "RAY_AUTH_TOKEN_PATH": str(self._token)}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        for line in yaml.safe_load(launcher.read_text(encoding="utf-8"))["head_start_ray_commands"]:
            if re.search(r"\bray (start|stop|health-check)\b|ray-head.pid", line):
                line = line.replace("6379", str(self.port)).replace(
                    " --autoscaling-config=~/ray_bootstrap_config.yaml", ""
                )
                subprocess.run(["bash", "-c", line], env=environment, check=True, timeout=130)
        wait_for(lambda: len(self._processes("raylet")) == 1, what="the head's raylet")

    def _ray_start(self, *options: str) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--node-ip-address=127.0.0.1",
            f"--object-store-memory={STORE_BYTES}", f"--dashboard-agent-listen-port={_free_port()}",
        ]  # fmt: skip
        log = self.home / "ray-start.log"
        with log.open("a") as file:  # not a pipe, which Ray's own processes would keep open
            done = subprocess.run(
                command, env=self._environment(), stdout=file, stderr=file, timeout=120, check=False
            )  # fmt: skip
        assert done.returncode == 0, log.read_text()

    # -------------------------------------------------------------------------------- the GCS

    def gcs(self) -> psutil.Process:
        (found,) = self._processes("gcs_server")
        return found

    def lose_gcs(self) -> list[str]:
        """Kills it; the command that it was started with."""
        process = self.gcs()
        command = process.cmdline()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=PATIENCE_S)
        return command

    def start_gcs(self, command: list[str]) -> None:
        """Starts it again, as whatever watches over it would."""
        with (self.home / "gcs-again.log").open("a") as file:
            subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def lose_head(self) -> None:
        """The head's machine: its GCS, its raylet and all that ran there."""
        (gcs,) = self._processes("gcs_server")
        heads = [p for p in self._processes("raylet") if "--head" in p.cmdline()]
        for process in (gcs, *heads, *(child for head in heads for child in head.children(recursive=True))):
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        # `ray start` reads there what runs on this machine, and would take the raylets of the other nodes for the head.
        (self.home / "ray" / "ray_current_cluster").unlink(missing_ok=True)

    def _processes(self, name: str) -> list[psutil.Process]:
        found = []
        for pid in reaper.marked(str(self.home)):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.name() == name and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def remove(self) -> None:
        reaper.end_session(str(self.home), 0.0)
        shutil.rmtree(self.home, ignore_errors=True)

    # -------------------------------------------------------------------------------- for those who use it

    def _environment(self) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return ours | self._settings | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token), reaper.MARK: str(self.home),
            "RAY_USAGE_STATS_ENABLED": "0", "PATH": path,
        }  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of a user of this cluster, who need not know how its head keeps its tables."""
        ours = {key: value for key, value in self._environment().items() if key not in self._settings}
        return ours | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}

    def orchestrator(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments], env=self.environment(), cwd=ROOT,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def start_driver(self, *arguments: str, settings: bool = False) -> subprocess.Popen[str]:
        """In an environment with the `settings` of the cluster, or without."""
        environment = self.environment() | (self._settings if settings else {})
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
