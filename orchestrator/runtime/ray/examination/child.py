"""The process that examines. Apart from the command's own, because much of what is examined can hang or end a process:
a mount, a driver, Ray's client when it has no token.

`python -m orchestrator.runtime.ray.examination.child SETTINGS DESCRIPTOR STAGE…` writes JSON lines to the descriptor:
{"begin": stage, "limit_s"} before a stage, {"end": stage, "checks", "blocked"} after it; `blocked` says that the way to
the cluster ends here. When its standard input is closed it takes away what it left in the storage and ends: it does not
outlive who asked.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

from monitoring.outside import json_text
from orchestrator.doctor import authentication, storage_probe, versions
from orchestrator.doctor import this_machine as machine
from orchestrator.doctor.check import HERE, NOTE, PROBLEM, WARNING, Check, is_ok, size, speed
from orchestrator.doctor.facts import gpu_facts, machine_facts, token_facts
from orchestrator.doctor.stages import STAGES, SWEEP, Settings
from orchestrator.doctor.storage import Probe, judge_storage

if TYPE_CHECKING:
    from orchestrator.runtime.ray.examination.examine import Examination

REPETITIONS = 3


class Examiner:
    """Runs stages by name."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = settings.address
        self._cluster: Examination | None = None
        self._is_storing = False
        self._is_abandoned = False
        self._at_rest = threading.Event()
        self._stages: dict[str, Callable[[], list[Check]]] = {
            "address": self._look_for_cluster,
            "machine": self._examine_machine,
            "GPUs": lambda: [machine.judge_gpus(HERE, gpu_facts())],
            "nodes": lambda: self.cluster.nodes(),
            "clock": lambda: self.cluster.clocks(),
            "ports": lambda: self.cluster.ports(),
            "dashboard": lambda: self.cluster.dashboard(),
            "autoscaler": lambda: self.cluster.autoscaler(),
            "bandwidth": self._measure_bandwidth,
            "storage": self._try_storage,
            SWEEP.name: self._sweep,
        }

    def run(self, name: str) -> list[Check]:
        """The checks of a stage. What it raises is a problem like any other."""
        stage = next(stage for stage in (*STAGES, SWEEP) if stage.name == name)
        begin = time.monotonic()
        self._at_rest.clear()
        try:
            checks = self._stages[name]()
        except Exception as error:
            lines = str(error).strip().splitlines()
            found = f"{type(error).__name__}: {lines[0] if lines else 'no more is known'}"
            checks = [Check(name, stage.where, PROBLEM, found, stage.advice)]
        self._at_rest.set()
        if self._is_abandoned:
            _wait_for_the_end()
        return [check.took(time.monotonic() - begin) for check in checks]

    @property
    def cluster(self) -> Examination:
        """The cluster, connected to when it is first needed."""
        if self._cluster is None:
            from orchestrator.runtime.ray.examination.examine import Examination

            assert self.address is not None
            self._cluster = Examination(self.address, self.settings)
            self._cluster.connect()
        return self._cluster

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()

    def abandon(self) -> None:
        """Ends in the middle, from another thread."""
        self._is_abandoned = True
        with suppress(Exception):
            self.close()
        # Without the cluster the stage soon fails; what it still did here is there to be swept then.
        self._at_rest.wait(timeout=2.0)
        if self._is_storing:
            self._sweep()

    def _look_for_cluster(self) -> list[Check]:
        assert self.settings.address is not None
        tokens = token_facts(os.environ, Path.home())
        checks = authentication.judge_token(tokens, to_cluster=True)
        if is_ok(checks):
            from orchestrator.runtime.ray.examination.address import find_cluster

            self.address, found = find_cluster(self.settings.address, tokens["path"] or tokens["source"])
            checks += found
        return checks

    def _examine_machine(self) -> list[Check]:
        facts = machine_facts(self._directories())
        checks = [
            *versions.judge_versions({HERE: facts}, versions.requirements()),
            machine.judge_open_files(HERE, facts),
            *machine.judge_disks(HERE, facts),
            machine.judge_shared_memory(HERE, facts),
        ]
        if self.settings.address is None:
            checks += authentication.judge_token(token_facts(os.environ, Path.home()), to_cluster=False)
        return checks

    def _directories(self) -> dict[str, str]:
        found = {"temporary files": tempfile.gettempdir(), "runs": str(Path("runs").absolute())}
        if self.settings.storage is not None and "://" not in self.settings.storage:
            found["checkpoints"] = self.settings.storage
        return found

    def _measure_bandwidth(self) -> list[Check]:
        if self.address is not None and len(self.cluster.labels()) > 1:
            return self.cluster.bandwidth(REPETITIONS)
        from orchestrator.doctor.exchange import loopback

        try:
            found = median(loopback(self.settings.exchange_bytes, REPETITIONS))
        except (OSError, RuntimeError) as error:
            return [Check("bandwidth", HERE, WARNING, f"two processes cannot use gloo: {str(error).splitlines()[0]}",
                          "see that loopback is up and that this machine's name resolves")]  # fmt: skip
        what = f"gloo, {size(self.settings.exchange_bytes)} each way, two processes over loopback: {speed(found)}"
        return [Check("bandwidth", HERE, NOTE, what)]

    def _try_storage(self) -> list[Check]:
        self._is_storing = True
        checks = self._try_storage_here() if self.address is None else self.cluster.storage()
        self._is_storing = False
        return checks

    def _try_storage_here(self) -> list[Check]:
        assert self.settings.storage is not None
        arguments = self.settings.storage, self.settings.probe
        name, num_bytes = f"{self.settings.probe}-0", self.settings.storage_bytes
        written = storage_probe.write_file(*arguments, name, num_bytes)
        read = storage_probe.read_file(*arguments, name, num_bytes) if "error" not in written else {}
        removed: dict[str, Any] = {}
        if "error" not in written:
            removed = storage_probe.remove_files(*arguments, [name])
            removed = removed or storage_probe.remove_directory(*arguments, written["made"])
        removal = {HERE: removed["error"]} if removed else {}
        return judge_storage(self.settings.storage, num_bytes, [Probe(HERE, name, HERE, written, read)], removal)

    def _sweep(self) -> list[Check]:
        assert self.settings.storage is not None
        arguments = self.settings.storage, self.settings.probe
        failed = storage_probe.remove_files(*arguments, None) or storage_probe.remove_directory(*arguments, [])
        return [Check("storage", HERE, WARNING, f"files of this check are left in the storage: {failed['error']}",
                      SWEEP.advice)] if failed else []  # fmt: skip


def main(settings: Settings, descriptor: int, names: list[str]) -> None:
    out = os.fdopen(descriptor, "w", encoding="utf-8")

    def say(**message: Any) -> None:
        try:
            print(json_text(message), file=out, flush=True)
        except BrokenPipeError:
            _wait_for_the_end()

    stages = {stage.name: stage for stage in (*STAGES, SWEEP)}
    examiner = Examiner(settings)
    threading.Thread(target=_end_with_parent, args=(examiner,), daemon=True).start()
    for name in names:
        if examiner.address is None and stages[name].needs_cluster:
            continue
        say(begin=name, limit_s=stages[name].limit_s)
        checks = examiner.run(name)
        blocked = stages[name].leads and not is_ok(checks) and not _is_connected(examiner, name)
        if blocked:
            examiner.address = None
        say(end=name, checks=[asdict(check) for check in checks], blocked=blocked)
    examiner.close()


def _is_connected(examiner: Examiner, name: str) -> bool:
    """Whether a leading stage found problems, but also nodes that can be asked more."""
    return name == "nodes" and examiner._cluster is not None and bool(examiner._cluster.labels())


def _wait_for_the_end() -> NoReturn:
    """Nobody listens any more; `_end_with_parent` is about to end this process."""
    while True:
        time.sleep(60)


def _end_with_parent(examiner: Examiner) -> None:
    while os.read(0, 1):
        pass
    try:
        examiner.abandon()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
