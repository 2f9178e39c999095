"""What members of a generation say, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.control.training import failures, state
from orchestrator.control.training.lifecycle import Lifecycle
from orchestrator.control.training.run import Run
from orchestrator.control.training.views import RunState, WorkerView
from orchestrator.training.messages import Finalized, Heartbeat, Joined, Left


class Members:
    """Takes the messages of those that train; messages of others, and of earlier generations, are nothing."""

    def __init__(self, run: Run, life: Lifecycle) -> None:
        self._run = run
        self._life = life

    def heartbeat(self, event: Heartbeat, now: float) -> None:
        view = self._run.roster.living(event.worker)
        if view is None:
            return
        view.last_heard, view.host_bytes, view.device_bytes = now, event.host_bytes, event.device_bytes
        view.lateness_s, view.gpu = event.lateness_s, event.gpu
        self._life.take_reports(event.reports, now)
        self._life.take_evaluations(event.evaluations)
        self._run.membership.heard(view, event, now)

    def joined(self, event: Joined, now: float) -> None:
        membership = self._run.membership
        view = membership.find(event.worker, event.generation)
        if view is None or view.joined:
            return
        membership.joined(view, now)
        self._run.record.incidents.moved(event.generation, event.bytes_moved, event.buffer_bytes)
        if self._run.state is RunState.FORMING and not membership.unjoined:
            self._life.train(now)

    def left(self, event: Left, now: float) -> None:
        view = self._run.membership.find(event.worker, event.generation)
        if view is not None and view.left is None:
            self.take_leave(view, event, now)
            self._life.conclude(now)

    def take_leave(self, view: WorkerView, event: Left, now: float) -> None:
        """A member is out of the generation, and says why."""
        run, generation = self._run, self._run.membership.generation
        assert generation is not None
        if event.cause in ("restore", "storage", "unusable") and (generation.restore is None or view.joined):
            # Nothing was restored here: something else could not be read.
            event = replace(event, cause="exception")
        run.membership.left(view, event, now)
        run.saving.left(view.worker, event.generation, event.committed)
        self._life.take_reports(event.reports, now, is_over=True)
        self._life.take_evaluations(event.evaluations)
        match event.cause:
            case "exception":
                # It changed no state: who alone holds a part of it tries again, others are replaced.
                alone = state.holds_alone(view, run.membership.members.values())
                self._life.handle_failure(failures.raised(view, event, spared=alone), now)
            case "device":
                run.out += run.roster.suspect(view.node, event.detail)
                run.out += run.roster.retire_unit(view)
                self._life.handle_failure(failures.device_failed(view, event), now)
            case "memory":
                self._life.handle_failure(failures.out_of_memory(view, event, run.config), now)
            case "restore":
                self._run.out += run.saving.invalid(generation.restore, event.detail)
                self._life.settle(now, interrupt=True)
            case "storage":
                self._life.settle(now, interrupt=True)
                self._life.count_failure(event.detail, 1.0, now)
            case "unusable" | "job":
                run.finish("failed", event.detail, now)
            case "peer":
                self._life.settle(now, interrupt=True)
            case "pause" | "complete":
                self._life.settle(now, interrupt=False)

    def finalized(self, event: Finalized, now: float) -> None:
        view, asked = self._run.roster.living(event.worker), self._run.finalization
        if view is None or asked is None or self._run.state is not RunState.FINALIZING:
            return
        view.last_heard = now
        if event.worker not in asked.asked:
            return
        if event.error:
            failure = failures.could_not_finish(view, event)
            self._life.handle_failure(failure, now)
            self._life.count_failure(failure.cause, 1.0, now)
        else:
            asked.answer(event.worker, event.digest)
        self._life.conclude(now)
