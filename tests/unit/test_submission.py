"""What a submission takes along, and what it is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError, is_package, runs_root
from orchestrator.runtime.ray.preparation import refuse_packages
from orchestrator.runtime.ray.submission import EXCLUDES, PACKAGES, Submission, SubmissionError, read_runtime_env

ROOT = Path(__file__).parents[2]
PACKAGE = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0")
JOB = """
name: test
model: {hf: {model_type: llama}}
data: {source: python-stdlib, sequence_length: 64}
train: {steps: 10, global_batch: 8}
"""


def test_this_package_goes_along_unless_it_is_there(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    environment = Submission(job, tmp_path).environment()
    assert environment["working_dir"] == str(tmp_path)
    assert environment["py_modules"] == [str(ROOT / name) for name in PACKAGES]
    assert set(EXCLUDES) <= set(environment["excludes"])
    assert "py_modules" not in Submission(ROOT / "job.yaml", ROOT).environment()


def test_what_a_user_wants_of_the_environment_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(
        "{pip: [s3fs], env_vars: {A: b, RAY_JOB_STOP_WAIT_TIME_S: '5'}, excludes: ['*.x'], py_modules: [x]}"
    )
    environment = Submission(tmp_path / "job.yaml", tmp_path, (), read_runtime_env(file)).environment()
    assert environment["pip"] == ["s3fs"]
    assert environment["env_vars"] == {"A": "b", "RAY_JOB_STOP_WAIT_TIME_S": "5"}
    assert environment["excludes"][0] == "*.x"
    assert environment["py_modules"][0] == "x"


@pytest.mark.parametrize("content", ["[1]", "{working_dir: .}", "{a: ["])
def test_a_bad_environment_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(content)
    with pytest.raises(SubmissionError, match=r"--runtime-env .*env\.yaml"):
        read_runtime_env(file)


def test_the_command_is_that_of_a_shell(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    submission = Submission(tmp_path / "jobs" / "a job.yaml", tmp_path, ["--set", "a.b={x: 'y z'}"])
    assert submission.entrypoint() == (
        "python -m orchestrator run 'jobs/a job.yaml' --set 'a.b={x: '\"'\"'y z'\"'\"'}'"
    )


def test_a_job_that_would_not_be_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(SubmissionError, match="--working-dir"):
        Submission(tmp_path / "job.yaml", tmp_path / "here").entrypoint()


def test_nothing_that_is_to_last_is_kept_where_ray_unpacks_a_job() -> None:
    assert is_package(PACKAGE / "sub")
    assert not is_package(ROOT)
    job = Job.loads(JOB)
    with pytest.raises(RunDirectoryError, match=r"--run-dir .* removes"):
        refuse_packages(job, RunDirectory(PACKAGE / "runs" / "x"))
    refuse_packages(job, RunDirectory("/shared/runs/x"))


def test_runs_of_a_submitted_job_are_kept_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_root() == Path("runs")
    monkeypatch.setattr(Path, "cwd", lambda: PACKAGE)
    assert runs_root() == Path.home() / "runs"
