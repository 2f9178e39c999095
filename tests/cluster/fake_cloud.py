"""A cloud on this machine: a Ray cluster whose autoscaler really starts and stops nodes, each a raylet of its own.

Ray's fake multi-node provider makes the nodes. It is named by its class, because autoscaler v2 (the one that sees
labels) looks for defaults of the type `fake_multinode` in a file that the wheel does not have. Everything has its own
temporary directory, ports and token; all of its processes carry a mark and are ended by that alone.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.runtime import reaper
from tests.cluster.conftest import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]
HEAD = "f" * 51 + "00000"
"""The provider's own name for the head; its nodes are f...f00001 and so on."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_TYPE = "ray.head.default"  # The provider gives it no other name.
STORE_BYTES = 80_000_000
NO_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
)  # fmt: skip


def node_type(most: int, market: str = "spot", **labels: str) -> dict[str, Any]:
    return {
        "resources": {"CPU": 1, "object_store_memory": STORE_BYTES},
        "labels": {"ray.io/market-type": market, **labels},
        "node_config": {},
        "min_workers": 0,
        "max_workers": most,
    }


class FakeCloud:
    """`types` are the kinds of nodes there are; `idle_minutes` is how long an idle one is kept."""

    def __init__(self, types: dict[str, dict[str, Any]], *, idle_minutes: float = 0.2, dashboard: bool = False) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="orch-cloud-", dir="/tmp"))
        self.port, self.dashboard_port = _free_port(), _free_port()
        self._dashboard = dashboard
        self._token = self.home / "token"
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)
        self._config = self.home / "cluster.yaml"
        self._config.write_text(yaml.safe_dump({
            "cluster_name": "fake",
            "max_workers": sum(each["max_workers"] for each in types.values()),
            "idle_timeout_minutes": idle_minutes,
            "upscaling_speed": 100.0,
            "provider": {"type": "external", "module": PROVIDER, "head_node_id": HEAD,
                         "gcs_address": f"127.0.0.1:{self.port}", "launch_multiple": True},
            "available_node_types": {
                HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **types,
            },
            "head_node_type": HEAD_TYPE,
            # The provider starts nodes by itself; autoscaler v2 wants to have been told so.
            "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
            **{key: [] for key in NO_COMMANDS},
        }))  # fmt: skip

    def start(self) -> None:
        """A head without processors; nodes come when somebody wants them."""
        environment = self._environment() | {
            "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_event_stats": "0",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={self.port}", "--num-cpus=0",
            f"--autoscaling-config={self._config}", f"--temp-dir={self.home / 'ray'}",
            f"--object-store-memory={STORE_BYTES}", "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={_free_port()}",
            *([f"--dashboard-port={self.dashboard_port}"] if self._dashboard else ["--include-dashboard=false"]),
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """Everything at once, as when the whole cluster is lost."""
        reaper.end_session(str(self.home), 0.0)

    def remove(self) -> None:
        import shutil

        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    # -------------------------------------------------------------------------------- for those who use it

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def _environment(self) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return ours | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token), reaper.MARK: str(self.home),
            "PATH": path,
        }  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of a user of this cluster."""
        return self._environment() | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}

    def run(self, *command: str, timeout_s: float = 120.0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(command), env=self.environment(), cwd=cwd, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def orchestrator(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "orchestrator", *arguments, timeout_s=timeout_s)

    def start_driver(self, *arguments: str, program: tuple[str, ...] = ("-m", "orchestrator")) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *program, *arguments], env=self.environment(), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    # -------------------------------------------------------------------------------- nodes

    def raylets(self) -> dict[str, psutil.Process]:
        """The raylets that live, but the head's, by node id."""
        found = {}
        for pid in reaper.marked(str(self.home)):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                    options = dict(part.lstrip("-").split("=", 1) for part in process.cmdline() if "=" in part)
                    if options["node_id"] != HEAD:
                        found[options["node_id"]] = process
        return found

    def lose(self, node: str) -> float:
        """A node that is gone at once, with all that ran there; when."""
        raylet = self.raylets()[node]
        family = [raylet, *raylet.children(recursive=True)]
        at = time.time()
        for process in family:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        return at

    def wait_for_nodes(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        wait_for(lambda: len(self.raylets()) == count, timeout_s, lambda: f"{count} nodes: {self.raylets()}")

    def placement_groups(self) -> list[dict[str, Any]]:
        """Those that are not removed."""
        code = (
            "import json, ray; ray.init(log_to_driver=False, logging_level='ERROR');"
            "print(json.dumps([g['name'] + ' ' + g['state'] for g in ray.util.placement_group_table().values()"
            " if g['state'] != 'REMOVED']))"
        )
        done = self.run(sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout.splitlines()[-1]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
