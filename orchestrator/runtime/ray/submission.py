"""Submitting a run as a Ray job: its files and this package go with it, so that a cluster needs only Ray and torch."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from monitoring.errors import UserError
from orchestrator.runtime.ray.session import ClusterError

PACKAGES = ("orchestrator", "strategies", "monitoring")
EXCLUDES = (".git", ".venv", "runs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")
"""What has no business on the cluster, whatever .gitignore says."""
GRACE_S = 30
"""How long `ray job stop` waits for the driver, which ends the run in good order meanwhile. Ray's own 3 s are short."""


AGENT_PATIENCE_S = 30.0
LOST_PATIENCE_S = 300.0


class SubmissionError(UserError, ValueError):
    """A job cannot be submitted as asked; says why and what to do."""


@dataclass(frozen=True)
class Submission:
    """What is to be run on a cluster: `orchestrator run` of a job file in `working_dir`, with these options.

    `runtime_env` is Ray's: what it says of `pip`, `env_vars` and so on goes with the job.
    """

    job: Path
    working_dir: Path
    options: Sequence[str] = ()
    runtime_env: dict[str, Any] = field(default_factory=dict)

    def entrypoint(self) -> str:
        """The shell command of the job. Raises SubmissionError when the job file would not be there."""
        try:
            relative = self.job.resolve().relative_to(self.working_dir.resolve())
        except ValueError:
            raise SubmissionError(
                f"{self.job} is not below {self.working_dir}, whose files go to the cluster; give another --working-dir"
            ) from None
        return shlex.join(["python", "-m", "orchestrator", "run", str(relative), *self.options])

    def environment(self) -> dict[str, Any]:
        """The `runtime_env`: the user's own, the working directory, and this package where that does not have it."""
        env = dict(self.runtime_env)
        env["working_dir"] = str(self.working_dir.resolve())
        env["excludes"] = [*dict.fromkeys((*(env.get("excludes") or ()), *EXCLUDES))]
        home = Path(__file__).resolve().parents[3]
        if home != self.working_dir.resolve():
            env["py_modules"] = [*(env.get("py_modules") or ()), *(str(home / name) for name in PACKAGES)]
        env["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **(env.get("env_vars") or {})}
        return env


def read_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime environment of Ray, in YAML or JSON. Raises SubmissionError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SubmissionError(f"--runtime-env {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SubmissionError(f"--runtime-env {path} must be a mapping, like {{pip: [s3fs]}}")
    if "working_dir" in content:
        raise SubmissionError(f"--runtime-env {path} has a working_dir; give it as --working-dir")
    return content


class Jobs:
    """The job server of a cluster (its dashboard). Raises ClusterError when it does not answer."""

    def __init__(self, address: str | None) -> None:
        if address is not None and "://" not in address and address != "auto":
            address = f"http://{address}"
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # Of its uploads nobody needs to know.
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = address or "the address in RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
            raise ClusterError(
                f"no Ray job server answers at {where}: {error}; it is the dashboard's, http://HEAD:8265 as a rule"
            ) from error

    @property
    def address(self) -> str:
        return str(self._client.get_address())

    def submit(self, submission: Submission, name: str, submission_id: str | None = None) -> str:
        """Uploads the files and starts the job; returns its submission id. A head that has just come up is given time
        to find the process that starts jobs."""
        deadline = time.monotonic() + AGENT_PATIENCE_S
        while True:
            try:
                identity: str = self._client.submit_job(
                    entrypoint=submission.entrypoint(),
                    runtime_env=submission.environment(),
                    submission_id=submission_id,
                    metadata={"orchestrator_job": name},
                )
            except (RuntimeError, ValueError) as error:
                if "No available agent" in str(error) and time.monotonic() < deadline:
                    time.sleep(1.0)
                    continue
                raise ClusterError(f"the cluster refused the job: {error}") from error
            return identity

    def follow(self, submission_id: str, show: Callable[[str], None]) -> tuple[str, int | None]:
        """Shows what the job prints until it ends; its status (SUCCEEDED, FAILED, STOPPED) and its exit code, if it
        came to one. Connections that break are made again.

        Raises ClusterError when the job is not known any more, or the server is gone for long.
        """
        shown, heard = 0, time.monotonic()
        while True:
            try:
                shown = asyncio.run(self._tail(submission_id, show, shown))
                info = self._client.get_job_info(submission_id)
                heard = time.monotonic()
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                if "404" in str(error):
                    raise ClusterError(
                        f"{self.address} does not know {submission_id} any more: its head is another one now; submit "
                        "the job again with the same --run-dir, and it goes on"
                    ) from error
                if time.monotonic() - heard > LOST_PATIENCE_S:
                    raise ClusterError(
                        f"{self.address} has not answered for {LOST_PATIENCE_S:.0f} s ({error}); the run may go on, "
                        f"`ray job logs --follow {submission_id}` or `orchestrator attach` follow it again"
                    ) from error
                time.sleep(2.0)
                continue
            if JobStatus(info.status).is_terminal():
                return str(info.status.value), info.driver_exit_code
            time.sleep(1.0)

    async def _tail(self, submission_id: str, show: Callable[[str], None], shown: int) -> int:
        """Passes over the first `shown` characters, which were shown before; how many there are now."""
        seen = 0
        async for text in self._client.tail_job_logs(submission_id):
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            if fresh:
                show(fresh)
        return max(seen, shown)
