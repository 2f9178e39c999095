"""The end of a run: its final state is saved, and those that have all of it are asked for its digest."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.control.training.finalizing import Finalization
from orchestrator.control.training.run import Run
from orchestrator.control.training.views import RunState, WorkerView
from orchestrator.training.messages import SavePlan
from orchestrator.training.orders import Finalize, SaveState


class Ending:
    """See the module."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def ask(self, committed: int, holders: Sequence[WorkerView], now: float) -> None:
        """These have all of the final state, of this many steps."""
        run = self._run
        run.state = RunState.FINALIZING
        run.finalization = Finalization(committed, holders, now)
        run.out.append(Finalize(tuple(run.finalization.asked)))
        self._save(now)

    def review(self, now: float) -> None:
        """Sees how its checkpoint is, and tries again where that makes sense."""
        run = self._run
        assert run.finalization is not None
        run.out += run.saving.give_up(run.finalization.committed, now, run.config.finalize_timeout_s)
        self._save(now)

    def check(self, now: float) -> bool:
        """Ends the run when all is known; False when nobody is left that has the state."""
        asked = self._run.finalization
        assert asked is not None
        if asked.unanswered():
            return True
        digests = asked.digests()
        if digests and self._may_yet_be_saved(asked.committed):
            return True
        if not digests:
            return False
        if len(set(digests.values())) > 1:
            shown = ", ".join(f"worker {worker.slot}: {digest[:23]}" for worker, digest in digests.items())
            self._run.finish("failed", f"the workers' final states differ, which must never happen: {shown}", now)
        else:
            self._end_well(asked.committed, next(iter(digests.values())), now)
        return True

    def _save(self, now: float) -> None:
        """The state that the run ends with is saved by those that have it, unless it was at its last step boundary."""
        run = self._run
        asked = run.finalization
        if asked is None or not (writers := tuple(asked.living())):
            return
        if now - asked.since > run.config.final_patience_s:
            run.saving.try_no_more(asked.committed)
        save = run.saving.attempt_at(asked.committed, run.config.term, run.record.last_generation, now)
        if save is not None:
            run.saving.expect(SavePlan(save, writers), now)
            run.out.append(SaveState(writers, save))

    def _may_yet_be_saved(self, committed: int) -> bool:
        """Whether a checkpoint of the final state is under way, or is tried again: the workers hold it meanwhile."""
        run = self._run
        if committed in run.saving.checkpoints:
            return False
        return run.saving.is_saving(committed) or not run.saving.has_given_up(committed)

    def _why(self) -> str:
        """Why a run is over that was not stopped."""
        run, judged = self._run, self._run.record.evaluations.judged
        if run.last_step == run.config.total_steps:
            return "all steps committed"
        return (
            f"early stopping after {run.last_step} steps: {judged.without} evaluations without a better one than "
            f"{judged.best:.6g} of step {judged.best_step}"
        )

    def _end_well(self, committed: int, digest: str, now: float) -> None:
        """The steps are done and their digest is known; but who has no checkpoint of them has nothing of the last."""
        run = self._run
        is_early = run.stop is not None and run.record.progress.committed < run.last_step
        status, reason = ("stopped", run.stop or "") if is_early else ("finished", self._why())
        saved = run.saving.checkpoints
        if committed not in saved:
            newest = f"the newest checkpoint is of {max(saved)} steps" if saved else "there is no checkpoint"
            reason = (
                f"{reason}, but the state of {committed} steps could not be saved: "
                f"{run.saving.why_unsaved(committed)}; {newest}, and `orchestrator resume` trains the rest again"
            )
            status = "failed"
        run.finish(status, reason, now, digest)
