"""A job whose data needs a password: every process of the run has it, and no file of the run does."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster.command_line import FEW, CommandLine
from tests.cluster.conftest import PATIENCE_S
from tests.in_process import orchestrator
from tests.password_server import PASSWORD, USER, password_server

STEPS = 20
LEISURELY = "model={factory: 'tests.small_models:leisurely', args: {seconds: 0.02}}"
"""A step takes long enough to be interrupted in."""
TEXT = b"".join(b"line %d of a text that nobody has to read\n" % number for number in range(2000))


@pytest.mark.nightly
@pytest.mark.parametrize("in_the_clear_too", [False, True])
def test_a_run_reads_with_a_password_that_is_written_down_nowhere(tmp_path: Path, in_the_clear_too: bool) -> None:
    pytest.importorskip("aiohttp")
    line = CommandLine(tmp_path, tmp_path / "cache")
    environment = {"ORCH_TEST_PASSWORD": PASSWORD}
    told, digests = "", []

    def finished() -> None:
        result = json.loads((line.run_dir / "result.json").read_text(encoding="utf-8"))
        assert (result["status"], result["steps"]) == ("finished", STEPS), told
        digests.append((result["state_digest"], result["data_digest"]))

    def interrupt(*arguments: str) -> str:
        process = line.start(*arguments, environment=environment)
        line.until_step(process, 3)
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=PATIENCE_S)[0]

    with password_server({"a.txt": TEXT}) as address:
        by_variable = f"http://{USER}:${{env:ORCH_TEST_PASSWORD}}@{address}"
        few = (*FEW, "--set", LEISURELY, "--set", f"train.steps={STEPS}",
               "--set", f"data.mirrors=['{by_variable}/mirror']", "--set", "elastic.workers={min: 1, max: 1}",
               "--fault", "step=10,kind=controller")  # fmt: skip

        line.run_dir = tmp_path / "by-variable"
        told += interrupt(*few, "--set", f"data.source={by_variable}/a.txt")
        resume = [sys.executable, "-m", "orchestrator", "resume", str(line.run_dir)]
        assert "ORCH_TEST_PASSWORD is not set" in line.spawn(resume).communicate(timeout=PATIENCE_S)[0]
        told += line.spawn(resume, environment).communicate(timeout=PATIENCE_S)[0]
        finished()
        assert "a secret stands in" not in told

        if in_the_clear_too:
            line.run_dir = tmp_path / "in-the-clear"
            in_the_clear = (*few, "--set", f"data.source=http://{USER}:{PASSWORD}@{address}/a.txt")
            told += interrupt(*in_the_clear)
            assert "a secret stands in data.source;" in told
            refused = orchestrator("resume", str(line.run_dir))
            assert refused.returncode != 0
            assert "not written down in a run directory" in refused.stdout + refused.stderr
            told += line.start(*in_the_clear, environment=environment).communicate(timeout=PATIENCE_S)[0]
            finished()
            assert digests[0] == digests[1]

    assert PASSWORD not in told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if PASSWORD.encode() in path.read_bytes()] == []
    line.nothing_left()
