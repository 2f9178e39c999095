"""`orchestrator submit`: a run as a job of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monitoring.outside import json_text
from monitoring.terminal.clean import clean_lines


def submit(
    job: Path,
    *,
    name: str,
    address: str | None,
    working_dir: Path,
    runtime_env: Path | None,
    submission_id: str | None,
    options: Sequence[str],
    follow: bool,
    as_json: bool,
) -> int:
    """Submits, and with `follow` shows what the job prints. Returns the exit code: that of the run when it is followed.

    Raises SubmissionError for what cannot be submitted, ClusterError when there is no cluster.
    """
    from orchestrator.runtime.ray.submission import Jobs, Submission, read_runtime_env

    environment = read_runtime_env(runtime_env) if runtime_env is not None else {}
    submission = Submission(job, working_dir, options, environment)
    submission.entrypoint()  # What is wrong with it is said before a cluster is asked.
    jobs = Jobs(address)
    identity = jobs.submit(submission, name, submission_id)
    if as_json:
        print(json_text({"submission_id": identity, "address": jobs.address, "entrypoint": submission.entrypoint()}))
    else:
        print(f"submitted {identity} to {jobs.address}", flush=True)
    if not follow:
        if not as_json:
            print(f"follow it with: ray job logs --address {jobs.address} --follow {identity}")
            print(f"end it with:    ray job stop --address {jobs.address} {identity}")
        return 0
    try:
        status, code = jobs.follow(identity, lambda text: print(clean_lines(text), end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nthe run goes on; end it with: ray job stop --address {jobs.address} {identity}")
        return 0
    if as_json:
        print(json_text({"submission_id": identity, "status": status, "exit_code": code}))
    if status == "STOPPED":
        return 3
    return code if code is not None else int(status != "SUCCEEDED")
