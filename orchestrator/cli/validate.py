"""`orchestrator validate`: what can be found out about a job before anything is started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from monitoring.outside import json_text, plain
from monitoring.terminal.clean import clean
from orchestrator.api import look_at_hooks
from orchestrator.job import Job
from orchestrator.job.load import located
from orchestrator.models.content import with_content
from orchestrator.models.problems import ModelError
from orchestrator.models.validation import check_model
from orchestrator.training.compared import with_compared


def validate(path: Path, overrides: Sequence[str], *, with_data: bool, as_json: bool, show: int = 0) -> None:
    """Loads the job file, builds its model without weights, reads the first records of its data, and prints the job.

    With `show` also that many sequences of its data, as they are trained on. Raises JobError with positions in the
    file, or DataError.
    """
    job = Job.load(path, overrides=overrides)
    with pointing_into(path, overrides):
        check_model(job)
        job = with_compared(with_content(job))
    shown: list[str] = []
    if job.hooks is not None:
        look_at_hooks(job.hooks)
    if with_data:
        from orchestrator.data.tokenizers import load_tokenizer
        from orchestrator.data.trying import as_text, try_data

        tokenizer = load_tokenizer(job.data.tokenizer)
        for number, each in enumerate(try_data(job, show), 1):
            count = len(each.ids) if each.counts is None else int(each.counts.sum())
            shown.append(f"# {number} of {each.url}: {len(each.ids)} tokens, {count} of them learnt")
            shown += [f"#   {line}" for line in as_text(each, tokenizer).splitlines()]
        if job.evaluation is not None and job.evaluation.tasks:
            from orchestrator.training.tasks import load_tasks

            load_tasks(job)
    if as_json:
        print(json_text({"job": job.resolved(), "digest": job.digest()}))
        return
    import yaml

    print(yaml.safe_dump(plain(job.resolved()), sort_keys=False).rstrip())
    print("\n".join(map(clean, [*shown, f"# digest of what decides the numbers: {job.digest()}"])))


@contextlib.contextmanager
def pointing_into(path: Path, overrides: Sequence[str], faults: Sequence[str] = ()) -> Iterator[None]:
    """Tells what is wrong with a model where its fields are in the job file: a ModelError becomes a JobError."""
    try:
        yield
    except ModelError as error:
        raise located(path, overrides, faults, error.findings) from error
