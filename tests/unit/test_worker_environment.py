"""A worker has the variables of its job before it imports anything that reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.abc, os, sys
from pathlib import Path
from orchestrator.control.core.workers import WorkerId
from orchestrator.job import Job
from orchestrator.runtime.ray.worker_actor import WorkerActor

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            seen.append(os.environ.get("NCCL_DEBUG"))

seen = []
assert "torch" not in sys.modules
sys.meta_path.insert(0, Watch())
home = Path(sys.argv[1])
job = Job.loads(
    "{name: test, model: {hf: {model_type: llama}}, data: {source: python-stdlib, sequence_length: 64}, "
    "train: {steps: 10, global_batch: 8}, resources: {env: {NCCL_DEBUG: WARN, NCCL_IB_DISABLE: 1}}}"
)
spec = {
    "job": job.model_dump(mode="json"), "run_id": "run", "run_dir": str(home / "nowhere"), "umask": 0o77,
    "environment": {}, "cwd": str(home), "own_cluster": True,
}
try:
    WorkerActor(WorkerId(0, 0), spec, None)._build()
except ValueError as error:
    assert "cannot be seen from node" in str(error), error
assert seen and set(seen) == {"WARN"}, seen
assert os.environ["NCCL_IB_DISABLE"] == "1"
print("it has")
"""


def test_a_worker_has_the_variables_of_its_job_when_it_imports_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("it has\n"), done.stdout + done.stderr
