"""The Ray actor around one worker process."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from orchestrator.messages import Generation, Reply, Status, WorkerId

REPORT_TIMEOUT_S = 2.0


class WorkerActor:
    """Starts building the worker in the background and stays responsive to commands from its event loop."""

    def __init__(self, worker: WorkerId, spec: dict[str, Any], controller: Any) -> None:
        self._id = worker
        self._spec = spec
        self._controller = controller
        self._worker: Any = None
        self._early: list[tuple[str, tuple[Any, ...]]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._build, name="build", daemon=True).start()

    def _build(self) -> None:
        try:
            os.chdir(self._spec["cwd"])
            if self._spec["cwd"] not in sys.path:
                sys.path.insert(0, self._spec["cwd"])
            from orchestrator.data import prepare
            from orchestrator.job import Job
            from orchestrator.worker.core import Worker

            job = Job.model_validate(self._spec["job"])
            store = prepare(
                source=job.data.source,
                format=job.data.format,
                field=job.data.field,
                tokenizer=job.data.tokenizer,
                cache=job.data.cache,
                expect=self._spec["store_digest"],
                verify=False,
            )
            context = ray.get_runtime_context()
            worker = Worker(
                self._id,
                job,
                run=self._spec["run_id"],
                node=context.get_node_id(),
                pid=os.getpid(),
                host=ray.util.get_node_ip_address(),
                store=store,
                checkpoint_dir=Path(self._spec["checkpoint_dir"]),
                report=self._report,
                on_orphaned=lambda: os._exit(3),
                on_shutdown=lambda: os._exit(0),
            )
            with self._lock:
                self._worker = worker
                early, self._early = self._early, []
            worker.start()
            for name, arguments in early:
                getattr(worker, name)(*arguments)
        except BaseException as error:
            traceback.print_exc()
            # What is wrong with the job (a model that does not fit, data that cannot be read) is wrong everywhere.
            fatal = isinstance(error, ValueError)
            with suppress(Exception):
                detail = str(error) if fatal else f"{type(error).__name__}: {error}"
                ray.get(self._controller.start_failed.remote(self._id, detail, fatal), timeout=REPORT_TIMEOUT_S)
            os._exit(4)

    def _report(self, message: Any) -> Reply | None:
        reply: Reply | None = ray.get(self._controller.report.remote(message), timeout=REPORT_TIMEOUT_S)
        return reply

    def _command(self, name: str, *arguments: Any) -> None:
        with self._lock:
            if self._worker is None:
                self._early.append((name, arguments))
                return
        getattr(self._worker, name)(*arguments)

    # Commands are coroutines only so that they run on the actor's event loop, beside the worker's own threads.

    async def join(self, generation: Generation) -> None:
        self._command("join", generation)

    async def interrupt(self, generation: int, epoch: int) -> None:
        self._command("interrupt", generation, epoch)

    async def pause(self, generation: int, epoch: int) -> None:
        self._command("pause", generation, epoch)

    async def finalize(self, save: bool, epoch: int) -> None:
        self._command("finalize", save, epoch)

    async def status(self, epoch: int) -> Status | None:
        """None while the worker is still being built."""
        worker = self._worker
        return None if worker is None else worker.status(epoch)

    async def hello(self) -> tuple[WorkerId, str, int]:
        """(worker, node id, pid)."""
        return self._id, ray.get_runtime_context().get_node_id(), os.getpid()

    async def life(self) -> None:
        """Never returns: whoever waits for it learns of this process's death within milliseconds."""
        await asyncio.Event().wait()

    async def leave(self) -> None:
        """Ends this process in good order."""
        if self._worker is not None:
            self._worker.shutdown()
        threading.Thread(target=_exit_soon, daemon=True).start()


def _exit_soon() -> None:
    time.sleep(0.05)
    os._exit(0)
