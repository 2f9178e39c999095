"""A worker's side of evaluation: on what, when, and what it knows of the weights before training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.data import Dataset, load_tokenizer
from orchestrator.data.held_out import HeldOut
from orchestrator.evaluation.judge import EvaluationRules, Judgement, is_measured
from orchestrator.evaluation.report import report_of
from orchestrator.job import Job
from orchestrator.models.problems import ModelError, refused
from orchestrator.training.generating import Generation
from orchestrator.training.messages import EvaluationReport
from orchestrator.training.references import References
from orchestrator.training.tasks import Tasks
from strategies.comm.fabric import Fabric
from strategies.objective.batch import Batch
from strategies.update.engine import StepEngine
from strategies.update.evaluation import Evaluation, Samples


class Evaluator:
    """`rules` are None where the job evaluates nothing. `seconds` are those of evaluations since they were taken."""

    def __init__(
        self, job: Job, dataset: Dataset, held_out: HeldOut | None, engine: StepEngine, catalog: Catalog
    ) -> None:  # fmt: skip
        self._job, self._engine, self._held_out = job, engine, held_out
        self.rules = EvaluationRules.of(job)
        self.seconds = 0.0
        self._references = References.of(job, dataset, held_out, engine.spec, catalog)
        samples = None if held_out is None or self._references is None else self._references.held_out
        self._evaluation = None if held_out is None else Evaluation(samples or held_out, engine.spec)
        asked = None if job.evaluation is None else job.evaluation.generate
        self._generation = None if asked is None else Generation.of(job, load_tokenizer(job.data.tokenizer))
        self._tasks = Tasks.of(job)
        self._fabric: Fabric | None = None
        if self._references is not None:
            engine.loads.source = self._references.joined_to(engine.loads.source)

    @property
    def moves(self) -> int:
        """Counts the micro-batches that were computed."""
        parts = (self._evaluation, self._references, self._generation, self._tasks)
        return sum(each.moves for each in parts if each is not None)

    def prepare(self, fabric: Fabric, committed: int) -> None:
        """Before the first step of a generation that begins at `committed` steps: what training compares with is known.
        Raises PeerLost, and UnusableCheckpoint where it is lost."""
        self._fabric = fabric
        if self._references is not None:
            self._references.bring(self._engine, fabric, committed)
        if committed == 0:
            self._look_for_metric()

    def _look_for_metric(self) -> None:
        """Before the first step: whether what decides will be measured, by a look at one micro-batch. (A metric of the
        user's own may say nothing of so little; that is seen at the first evaluation.) Raises PeerLost, and ModelError
        where it will not."""
        if self.rules is None or not self.rules.decides or self.rules.metric == "loss":
            return
        if self._job.evaluation is not None and self._job.evaluation.metrics:
            return
        task, slash, _ = self.rules.metric.partition("/")
        if slash and self._tasks is not None:
            if task not in self._tasks.names:
                raise self._not_measured(f"tasks are {', '.join(self._tasks.names)}")
        elif self._evaluation is not None:
            one = Evaluation(_First(self._evaluation.samples), self._engine.spec)
            self._check_metric(report_of(self._job, self._engine.evaluate(0, one)))
        else:
            raise self._not_measured("of tasks they are called TASK/METRIC")

    def _check_metric(self, metrics: Mapping[str, Any]) -> None:
        if self.rules is not None and self.rules.decides and not is_measured(metrics, self.rules.metric):
            names = sorted(name for name, value in metrics.items() if not isinstance(value, list))
            raise self._not_measured(f"there are {', '.join(names)}")

    def _not_measured(self, there: str) -> ModelError:
        assert self.rules is not None
        return refused(f"nothing that is measured is called {self.rules.metric!r}; {there}", "evaluation.best.metric")

    def evaluate(self, committed: int, generation: int, judged: Judgement) -> EvaluationReport | None:
        """What the weights after `committed` steps are worth, if they are to be evaluated and were not; all ranks find
        it alike. Raises PeerLost."""
        rules = self.rules
        if rules is None or committed <= judged.step or not rules.is_due(committed):
            return None
        started = time.perf_counter()
        metrics, count = {}, 0
        if self._evaluation is not None and self._held_out is not None:
            metrics = report_of(self._job, self._engine.evaluate(committed, self._evaluation))
            count = self._held_out.num_samples
        if self._tasks is not None:
            assert self._fabric is not None
            metrics |= self._tasks.run(self._engine, self._fabric, committed)
        if judged.step < 0:
            self._check_metric(metrics)
        if self._generation is not None:
            metrics["generated"] = self._generation.run(self._engine, committed)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return EvaluationReport(committed, generation, metrics, count, round(seconds, 4))

    def take_seconds(self) -> float:
        """How long evaluations have taken since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class _First:
    """The first micro-batch of some samples. See `Samples`."""

    num_micro_batches = 1

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def batch(self, index: int) -> Batch:
        return self._samples.batch(index)
