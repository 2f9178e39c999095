"""The Ray actor around one worker process."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from monitoring.clock import reading
from monitoring.redaction import redact
from orchestrator.control.core.orders import Leave, Order
from orchestrator.control.core.workers import WorkerId
from orchestrator.runtime.action_log import set_up_logs
from orchestrator.runtime.mailbox import Delivery, Introduction
from orchestrator.runtime.ray.surroundings import go_to
from orchestrator.training.messages import Reply
from orchestrator.urls import take_over

if TYPE_CHECKING:
    from orchestrator.job import Job
    from orchestrator.training.teaching import Ask

log = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 2.0
LISTEN_S = 20.0
"""How long the controller may hold a call that asks for orders when there are none."""

ZONE_LABEL = "ray.io/availability-zone"
"""Ray's own label of a node, from RAY_NODE_ZONE or --labels when the node is started."""


class WorkerActor:
    """Its one method trains on the process's main thread until told to leave; a thread beside it fetches orders."""

    def __init__(self, worker: WorkerId, spec: dict[str, Any], controller: Any) -> None:
        self._id = worker
        self._spec = spec
        self._controller = controller
        self._worker: Any = None
        self._early: list[tuple[Order, int]] = []
        self._lock = threading.Lock()

    def live(self) -> None:
        """Builds the worker and trains. A call that waits for this one to end learns of the process's death within
        milliseconds."""
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        try:
            worker = self._build()
        except BaseException as error:
            log.exception("worker %s could not be built", self._id)
            print(redact(traceback.format_exc()), file=sys.stderr)
            # What is wrong with the job (a model that does not fit, data that cannot be read) is wrong everywhere.
            fatal = isinstance(error, ValueError)
            with suppress(Exception):
                detail = str(error) if fatal else f"{type(error).__name__}: {error}"
                ray.get(self._controller.start_failed.remote(self._id, detail, fatal), timeout=REPORT_TIMEOUT_S)
            os._exit(4)
        try:
            with self._lock:
                self._worker = worker
                early, self._early = self._early, []
            worker.start()
            for order, term in early:
                worker.take(order, term)
            worker.train()
        except BaseException:
            log.exception("worker %s ends", self._id)
            print(redact(traceback.format_exc()), file=sys.stderr)
            os._exit(5)

    def _build(self) -> Any:
        os.umask(self._spec["umask"])  # What is written of this run is as open as its directory.
        about = set_up_logs(self._spec, f"worker-{self._id}", worker=self._id.slot)
        take_over(self._spec["environment"])
        go_to(self._spec["cwd"])
        from orchestrator.job import Job

        job = Job.model_validate(self._spec["job"])
        os.environ.update(job.resources.env)  # Before torch is imported, which reads some of it then.
        from orchestrator.checkpoint.of_run import open_catalog
        from orchestrator.data.of_job import dataset_of, held_out_of, open_stores
        from orchestrator.training.worker import Worker

        if job.checkpoint.storage is None and not Path(self._spec["run_dir"]).is_dir():
            raise ValueError(
                f"the run directory {self._spec['run_dir']} cannot be seen from node {ray.util.get_node_ip_address()}: "
                "checkpoints need one that every node mounts (--run-dir), or checkpoint.storage"
            )
        stores = open_stores(job, self._spec["stores"])
        held_out = open_stores(job, self._spec["held_out"], is_held_out=True)
        return Worker(
            self._id,
            job,
            run=self._spec["run_id"],
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            # On a cluster of our own all processes are on this machine, and nobody else is to reach them.
            host="127.0.0.1" if self._spec["own_cluster"] else ray.util.get_node_ip_address(),
            secret=self._spec["rendezvous_secret"],
            zone=str(ray.get_runtime_context().get_node_labels().get(ZONE_LABEL, "")),
            dataset=dataset_of(job, stores),
            held_out=held_out_of(job, held_out),
            catalog=open_catalog(self._spec["catalog"], self._spec["secret"]),
            report=self._report,
            on_orphaned=lambda: os._exit(3),
            on_shutdown=lambda: os._exit(0),
            on_broken=lambda: os._exit(6),
            log_context=about,
            ask=self._teachers(job),
        )

    def _teachers(self, job: Job) -> Ask | None:
        """Those in processes of their own; None where each worker has its own."""
        if not job.elastic.teachers:
            return None
        from orchestrator.runtime.ray.teachers import RemoteTeachers

        return RemoteTeachers(self._spec["run_id"], job)

    def _report(self, message: Any) -> Reply | None:
        sent = self._controller.report.remote(self._id, message, reading())
        reply: Reply | None = ray.get(sent, timeout=REPORT_TIMEOUT_S)
        return reply

    # ------------------------------------------------------------------------------------ the orders thread

    def _listen(self) -> None:
        node, pid = ray.get_runtime_context().get_node_id(), os.getpid()
        term, after = -1, 0
        while True:
            try:
                call = self._controller.orders.remote(self._id, term, after, LISTEN_S)
                orders: Delivery = ray.get(call, timeout=LISTEN_S + 5.0)
                if orders.term != term:
                    worker = self._worker
                    status = None if worker is None else worker.status(orders.term)
                    introduction = Introduction(self._id, node, pid, status, reading())
                    ray.get(self._controller.introduce.remote(introduction), timeout=REPORT_TIMEOUT_S)
                    term, after = orders.term, 0
                    continue
            except Exception as error:
                # The controller is being restarted. Whether it ever comes back is for the lease to judge.
                log.debug("no orders: %s", error)
                time.sleep(0.05)
                continue
            for number, order in orders.pending:
                after = number
                try:
                    self._obey(order, orders.term)
                except Exception:
                    # The next order must be heard in any case; a worker that is no good is found by what it does.
                    log.exception("order %d (%s) failed", number, type(order).__name__)

    def _obey(self, order: Order, term: int) -> None:
        if isinstance(order, Leave):
            self._leave()
            return
        with self._lock:
            if self._worker is None:
                self._early.append((order, term))
                return
        self._worker.take(order, term)

    def _leave(self) -> None:
        """Ends this process in good order."""
        if self._worker is not None:
            self._worker.shutdown()
        time.sleep(0.05)
        os._exit(0)
