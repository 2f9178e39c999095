"""Finding a Ray cluster, or starting one on this machine for the length of a run."""

from __future__ import annotations

import atexit
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from monitoring.errors import UserError
from monitoring.redaction import redact
from orchestrator.job import Job
from orchestrator.rundir import is_package
from orchestrator.runtime import reaper
from orchestrator.runtime.ray import compat
from orchestrator.runtime.ray.names import NAMESPACE

_OBJECT_STORE_BYTES = 128 << 20
"""Nothing large goes through the object store here; the smallest useful one spares shared memory."""


HEAD = "orchestrator_head"
"""A resource of the head of a cluster of our own. The controller asks for some of it, because an affinity to a node is
forgotten when the scheduler has not heard of that node yet."""

_FRUGAL = {
    # Task histories and statistics that nobody looks at would cost a share of every step on a small machine.
    "task_events_report_interval_ms": 0,
    "enable_metrics_collection": False,
    "event_stats": False,
    # What is looked at ten times a second on a busy cluster is looked at twice on one that holds a dozen processes.
    "raylet_check_gc_period_milliseconds": 500,
    "object_manager_timer_freq_ms": 500,
    "kill_idle_workers_interval_ms": 1000,
    "memory_monitor_refresh_ms": 0,
}


CONNECT_PATIENCE_S = 5.0
"""How long a cluster may be unreachable when a run starts."""
STARTS = 3
"""How often a cluster of our own is started, all in all, when it does not come up: Ray gives a node 30 s."""


class ClusterError(UserError, RuntimeError):
    """Ray cannot be reached or started; says what to do."""

    exit_code = 1


class NotStarted(ClusterError):
    """A Ray of our own did not come up, for a `cause` that may not be there the next time."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"{cause}; if the machine was busy with other things, give the same command again when it is less so"
        )
        self.cause = cause


@contextmanager
def ray_session(job: Job, local_nodes: int, logs: Path, on_note: Callable[[str], None]) -> Iterator[bool]:
    """Connects to Ray for the length of the block; yields whether the cluster is ours and ends with it.

    With `RAY_ADDRESS` set (or Ray initialised already) that cluster is used. Otherwise one is started on this machine:
    a single node with enough logical CPUs for the job, or, with `local_nodes`, a head without CPUs and that many
    worker nodes as separate raylets, each with its share of the CPUs, so that losing a node can be practised.
    The logs of a cluster of our own are kept in `logs` when it ends. One that does not come up is started again, which
    `on_note` is told.

    Raises ClusterError.
    """
    if ray.is_initialized():
        if local_nodes:
            raise ClusterError("--local-nodes starts nodes of its own, but this process is connected to a Ray already")
        yield False
        return
    if os.environ.get("RAY_ADDRESS"):
        if local_nodes:
            raise ClusterError("--local-nodes starts nodes of its own and cannot be used together with RAY_ADDRESS")
        with connected(None):
            yield False
        return
    with ExitStack() as cluster:
        for number in range(1, STARTS + 1):
            try:
                cluster.enter_context(_own_session(job, local_nodes, logs))
                break
            except NotStarted as error:
                if number == STARTS:
                    raise
                on_note(f"{error.cause}; trying once more")
        yield True


@contextmanager
def _own_session(job: Job, local_nodes: int, logs: Path) -> Iterator[None]:
    """A Ray of our own, of which nothing is left after the block. Raises ClusterError."""
    # Ray opens its directory to everybody; in this one, which stays ours, nobody gets there.
    home = tempfile.mkdtemp(prefix="orchestrator-", dir="/tmp")
    # A Ray that did not come up makes its directory once more when this process ends. What is registered before it does
    # so comes after it.
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    guard = reaper.start(home)
    os.environ[reaper.MARK] = home
    try:
        with _own_cluster(job, local_nodes, home):
            yield
    finally:
        os.environ.pop(reaper.MARK, None)
        reaper.end_session(home, patience_s=3.0, spare=frozenset({guard.pid}))
        guard.kill()
        guard.wait()
        _keep_logs(Path(home), logs)
        shutil.rmtree(home, ignore_errors=True)


def has_cluster() -> bool:
    """Whether a cluster is given that a run would go to, rather than to one of its own."""
    return bool(ray.is_initialized() or os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connects to the cluster at `address`, or that of RAY_ADDRESS, for the length of the block.

    Raises ClusterError.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ClusterError("no cluster is named: give --address HOST:PORT, or set RAY_ADDRESS")
    _check_answers(address)
    here = os.getcwd()
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error}; `orchestrator doctor --address {address}` looks closer"
        ) from error
    _hush()
    return_to(here)
    try:
        yield
    finally:
        ray.shutdown()


def return_to(here: str) -> None:
    """Where several raylets share a machine, one of them may unpack the files of a submitted job anew, and what was
    this process's directory is another then."""
    deadline = time.monotonic() + 5.0
    while True:
        try:
            os.chdir(here)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _check_answers(address: str) -> None:
    """Whether something listens there: Ray itself tries for a minute, and then dies without a word of use.

    Raises ClusterError.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # `auto`, `local`, a Ray client: what these mean only Ray knows.
    deadline = time.monotonic() + CONNECT_PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise ClusterError(
                f"no Ray cluster answers at {address}: {error}; check the address, and whether its head is up"
            ) from error
        return


def for_workers(here: str) -> str | None:
    """Where relative paths start on every node, for a driver that started `here`; None when that is a directory that
    Ray brings to each node itself (the `working_dir` of a submitted job), where processes of a run are already."""
    return None if is_package(Path(here)) else here


@contextmanager
def _own_cluster(job: Job, local_nodes: int, home: str) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING", "0")
    # A place more than the job can fill: a replacement starts beside the worker, or the tensor-parallel group, that it
    # replaces.
    tensor = job.strategy.tensor
    units = math.ceil((job.elastic.workers.max + job.elastic.standby + job.elastic.teachers) / tensor) + 1
    needed = math.ceil(units * tensor * job.resources.cpu)
    quiet: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_system_config": _FRUGAL,
    }
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    cluster: Any = None
    usual_tmpdir = os.environ.get("RAY_TMPDIR")
    try:
        with _without_idle_services(), _deaf_to_hangup(), _in_our_words():
            if local_nodes:
                from ray.cluster_utils import Cluster

                # It writes its address below the temporary directory, where another Ray of this user may write too.
                os.environ["RAY_TMPDIR"] = home
                (Path(home) / "ray").mkdir()
                share = math.ceil(units / local_nodes) * tensor * math.ceil(job.resources.cpu)
                cluster = Cluster(
                    initialize_head=True,
                    shutdown_at_exit=False,
                    head_node_args={"num_cpus": 0, "resources": {HEAD: 1}, **quiet},
                )
                for index in range(local_nodes):
                    cluster.add_node(
                        wait=False, num_cpus=share, labels={"orchestrator-node": str(index)},
                        object_store_memory=_OBJECT_STORE_BYTES,
                    )  # fmt: skip
                cluster.wait_for_nodes(timeout=60)
                ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    num_cpus=needed, resources={HEAD: 1}, namespace=NAMESPACE,
                    log_to_driver=False, logging_level=logging.ERROR,
                    _temp_dir=str(Path(home) / "ray"), **quiet,
                )  # fmt: skip
        _hush()
        if not had_token:
            with suppress(OSError):
                token.chmod(0o600)  # Ray made it, for everybody to read.
        yield
    finally:
        with suppress(Exception):
            ray.shutdown()
        if cluster is not None:
            with suppress(Exception):
                cluster.shutdown()
        os.environ.pop("RAY_TMPDIR", None)
        if usual_tmpdir is not None:
            os.environ["RAY_TMPDIR"] = usual_tmpdir


@contextmanager
def _in_our_words() -> Iterator[None]:
    """Ray raises bare exceptions when it does not come up, with a limit of 30 s of its own. Raises NotStarted."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        text = str(error).rstrip(".")
        raise NotStarted(f"Ray did not start on this machine: {type(error).__name__}: {text}") from error


@contextmanager
def _deaf_to_hangup() -> Iterator[None]:
    """What is started in this block ignores SIGHUP, and so does what that starts: when a terminal is closed, all its
    processes get it, and the run is to end in good order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _without_idle_services() -> Iterator[None]:
    """Ray is started without the processes that have nothing to do on a cluster of one machine.

    The log monitor reads every log ten times a second to forward what nobody asked for (`log_to_driver` is off), the
    autoscaler's monitor scales nothing, and the dashboard's server, switched off, serves nothing but costs the most.
    """
    node = compat.Node
    names = ("start_log_monitor", "start_monitor", "start_api_server")
    originals = {name: getattr(node, name) for name in names if hasattr(node, name)}
    try:
        for name in originals:
            setattr(node, name, lambda *arguments, **options: None)
        yield
    finally:
        for name, original in originals.items():
            setattr(node, name, original)


def _hush() -> None:
    """Keeps Ray from printing a paragraph for every dead worker: what matters of it is in the run's own events."""
    with suppress(Exception):
        compat.silence_worker_output()


def _keep_logs(home: Path, logs: Path) -> None:
    with suppress(OSError):
        logs.mkdir(exist_ok=True)  # Not its parents: a run directory that was deleted is not made again.
        for path in home.glob("**/session_*/logs/worker-*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                with (
                    path.open(encoding="utf-8", errors="backslashreplace") as lines,
                    (logs / path.name).open("w", encoding="utf-8") as kept,
                ):
                    kept.writelines(map(redact, iter(lambda: lines.readline(1 << 20), "")))
                (logs / path.name).chmod(0o666 & logs.stat().st_mode)  # Ray's are everybody's to read.
