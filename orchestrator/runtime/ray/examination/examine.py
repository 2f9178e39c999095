"""The stages of an examination that need a cluster: asks its nodes, and has `orchestrator.doctor` judge the answers."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

from orchestrator.doctor import authentication, network, storage_probe, versions
from orchestrator.doctor import this_machine as machine
from orchestrator.doctor.check import CLUSTER, HERE, NOTE, OK, WARNING, Check
from orchestrator.doctor.facts import machine_facts
from orchestrator.doctor.stages import Settings
from orchestrator.doctor.storage import Probe, judge_storage, readers
from orchestrator.runtime.ray.examination import node as node_module
from orchestrator.runtime.ray.examination.address import mode_here
from orchestrator.runtime.ray.examination.nodes import Failed, Nodes, Unreachable

CLOCK_READINGS = 5


class Examination:
    """One cluster, connected to; `close` leaves it as it was."""

    def __init__(self, address: str, settings: Settings) -> None:
        self._settings = settings
        self._nodes = Nodes(address)
        self._with_gpus: set[str] = set()
        self._unreachable: Check | None = None

    def connect(self) -> None:
        """Once; `nodes` tells what was found."""
        try:
            self._nodes.connect()
        except Unreachable as error:
            self._unreachable = error.check

    def close(self) -> None:
        self._nodes.close()

    def labels(self) -> list[str]:
        """The nodes that can be asked."""
        return self._nodes.labels()

    def nodes(self) -> list[Check]:
        """What each node is: versions, limits, disks, shared memory, GPUs, authentication."""
        if self._unreachable is not None:
            return [self._unreachable]
        directories = {}
        if self._settings.storage is not None and "://" not in self._settings.storage:
            directories["checkpoints"] = self._settings.storage
        calls: dict[Any, Any] = {
            label: (label, "facts", ({"Ray's session": self._nodes.all[label].session_dir, **directories},))
            for label in self.labels()
        }
        answers = self._nodes.ask(calls, 30.0)
        for label, answer in answers.items():
            if isinstance(answer, Failed):
                self._nodes.give_up(label, f"cannot be examined: {answer.reason}")
        facts = {label: answer for label, answer in answers.items() if not isinstance(answer, Failed)}
        gpus = self._look_at_gpus()
        here = machine_facts({})
        checks = self._silent_now([])
        checks.append(Check("nodes", CLUSTER, OK if facts else NOTE, f"{len(facts)} of {len(self._nodes.all)} nodes "
                            "can be asked"))  # fmt: skip
        checks += authentication.judge_modes(mode_here(), {label: own["mode"] for label, own in facts.items()})
        checks += [
            check for check in versions.judge_versions({HERE: here, **facts}, versions.requirements(), HERE)
            if check.node != HERE
        ]  # fmt: skip
        for label, own in facts.items():
            resources = self._nodes.all[label].resources
            checks.append(machine.judge_open_files(label, own, len(self._nodes.all)))
            checks += machine.judge_disks(label, own)
            checks.append(machine.judge_shared_memory(label, own, resources.get("object_store_memory")))
        hosts = {label: (label, "interface", (node.host,)) for label, node in self._nodes.all.items() if label in facts}
        for label, found in self._nodes.ask(hosts, 10.0).items():
            if not isinstance(found, Failed):
                checks.append(network.judge_interface(label, found))
        for label, own in gpus.items():
            checks.append(machine.judge_gpus(label, own, self._nodes.all[label].resources.get("GPU", 0)))
        return checks + machine.judge_gpu_software(gpus)

    def _look_at_gpus(self) -> dict[str, Any]:
        found = self._nodes.ask_all("gpus", limit_s=60.0)
        self._with_gpus = {label for label, own in found.items() if own["devices"]}
        return found

    def clocks(self) -> list[Check]:
        readings: dict[str, list[network.ClockReading]] = {label: [] for label in self.labels()}
        for label in self.labels():
            for _ in range(CLOCK_READINGS):
                sent_s = time.time()
                answer = self._nodes.ask({label: (label, "now_s", ())}, 5.0)[label]
                if isinstance(answer, Failed):
                    self._nodes.give_up(label, f"does not tell the time: {answer.reason}")
                    break
                readings[label].append(network.ClockReading(sent_s, answer, time.time()))
        return self._silent_now([network.judge_clock(label, found) for label, found in readings.items() if found])

    def ports(self) -> list[Check]:
        listening = self._nodes.ask_all("listen", limit_s=10.0)
        pairs = network.connections(list(listening))
        if not pairs:
            return self._silent_now([Check("ports", CLUSTER, NOTE, "one node: nobody to connect to")])
        targets: dict[str, dict[str, tuple[str, int]]] = {}
        for one, other in pairs:
            targets.setdefault(one, {})[other] = (self._nodes.all[other].host, listening[other])
        answers = self._nodes.ask({one: (one, "connect", (own,)) for one, own in targets.items()}, 50.0)
        seconds: dict[network.Pair, float | str] = {}
        for one, other in pairs:
            answer = answers[one]
            seconds[one, other] = answer.reason if isinstance(answer, Failed) else answer[other]
        return self._silent_now(network.judge_connections(seconds))

    def _silent_now(self, checks: list[Check]) -> list[Check]:
        """With what is to be said of nodes that fell silent meanwhile."""
        silent, self._nodes.silent = self._nodes.silent, []
        return silent + checks

    def dashboard(self) -> list[Check]:
        """Whether `ray job submit` and the dashboard's pages would be answered, from the head and from here."""
        found = self._nodes.gcs.internal_kv_get(b"webui:url", namespace=b"dashboard", timeout=5.0)
        if not found:
            return [Check("dashboard", CLUSTER, NOTE, "there is none: `ray job submit` has nobody to ask")]
        address = found.decode()
        url = f"http://{address}/api/version"
        head = self._nodes.head
        at_head = self._nodes.ask({0: (head, "get", (url,))}, 10.0)[0] if head else Failed("the head cannot be asked")
        if isinstance(at_head, Failed):
            at_head = at_head.reason
        if at_head != 200:
            return [Check("dashboard", CLUSTER, WARNING, f"{address} does not answer at the head: {at_head}",
                          "see dashboard.log there; without it `ray job submit` does not work")]  # fmt: skip
        here = node_module.http_status(url)
        if here == 200:
            return [Check("dashboard", CLUSTER, OK, f"answers at {address}")]
        return [Check("dashboard", CLUSTER, NOTE, f"{address} answers at the head, but not here ({here}): submit jobs "
                      "from the head, or start it with --dashboard-host=0.0.0.0")]  # fmt: skip

    def autoscaler(self) -> list[Check]:
        """Whether nodes can come and go by themselves, and whether the head is taken for a worker."""
        head = next((node for node in self._nodes.all.values() if node.is_head), None)
        checks = [self._who_scales()]
        others = len(self._nodes.all) > 1 or checks[0].level == OK
        if head is not None and others:
            cpus = head.resources.get("CPU", 0)
            if cpus:
                checks.append(Check("head", head.label, NOTE, f"offers {cpus:g} CPUs: workers may be placed on it; "
                                    "--num-cpus=0 keeps them off"))  # fmt: skip
            else:
                checks.append(Check("head", head.label, OK, "offers no CPUs"))
        return checks

    def _who_scales(self) -> Check:
        head = self._nodes.head
        if head is None:
            return Check("autoscaler", CLUSTER, NOTE, "unknown: the head cannot be asked")
        if crash := self._nodes.gcs.internal_kv_get(b"__autoscaling_error", namespace=None, timeout=5.0):
            last = crash.decode(errors="replace").strip().splitlines()[-1]
            return Check("autoscaler", CLUSTER, WARNING, f"died: {last}", "see monitor.log and monitor.err in the logs "
                         "of the head; until it runs again no node comes or goes")  # fmt: skip
        found = self._nodes.ask({0: (head, "autoscaler", (self._nodes.address,))}, 10.0)[0]
        if isinstance(found, Failed):
            return Check("autoscaler", CLUSTER, NOTE, f"unknown: {found.reason}")
        if found["configured"]:
            return Check("autoscaler", CLUSTER, OK, "Ray's monitor on the head adds and removes nodes")
        # KubeRay's runs in a container of its own, and only its reports are seen.
        reported = self._nodes.gcs.internal_kv_get(b"__autoscaling_status", namespace=None, timeout=5.0)
        if reported and not found["monitor"]:
            return Check("autoscaler", CLUSTER, OK, "one outside the head's container reports")
        return Check("autoscaler", CLUSTER, NOTE, "none: the cluster stays as large as it is")

    def bandwidth(self, repetitions: int) -> list[Check]:
        """Pairs of nodes, round after round; NCCL when both have GPUs, or else gloo."""
        if not self._with_gpus:
            self._look_at_gpus()
        cuda = bool(self._with_gpus) and self._with_gpus >= set(self.labels())
        num_bytes = self._settings.exchange_bytes
        speeds = network.Speeds(num_bytes, "NCCL" if cuda else "gloo")
        for pairs in network.rounds(self.labels()):
            hosts = {label: self._nodes.all[label].host for label in chain(*pairs)}
            ports = self._nodes.ask({pair: (pair[0], "open_store", (hosts[pair[0]],)) for pair in pairs}, 40.0)
            calls: dict[Any, Any] = {}
            for pair, port in ports.items():
                if isinstance(port, Failed):
                    speeds.pairs[pair] = f"{pair[0]} opens no port: {port.reason}"
                    continue
                store = hosts[pair[0]], port
                rest = num_bytes, repetitions, cuda
                calls[pair, 0] = pair[0], "exchange", (None, hosts[pair[0]], *rest)
                calls[pair, 1] = pair[1], "exchange", (store, hosts[pair[1]], *rest)
            answers = self._nodes.ask(calls, 50.0)
            for pair in pairs:
                if pair not in speeds.pairs:
                    speeds.pairs[pair] = _outcome(answers[pair, 0], answers[pair, 1])
        return network.judge_bandwidth(speeds)

    def storage(self) -> list[Check]:
        """Every node and this machine write a file, read another one's, and remove what they made."""
        url, directory, num_bytes = self._settings.storage, self._settings.probe, self._settings.storage_bytes
        assert url is not None
        nodes = [HERE, *self.labels()]
        names = {node: f"{directory}-{index}" for index, node in enumerate(nodes)}
        try:
            written = self._everywhere("write_file", {node: (url, directory, names[node], num_bytes) for node in nodes})
            whose = readers(nodes)
            read = self._everywhere(
                "read_file", {node: (url, directory, names[whose[node]], num_bytes) for node in nodes}
            )
        finally:
            removed = self._everywhere("remove_files", {node: (url, directory, [names[node]]) for node in nodes})
        made = {node: written[node].get("made", []) for node in nodes}
        emptied = self._everywhere("remove_directory", {node: (url, directory, made[node]) for node in nodes})
        # Who could write nothing has nothing to remove.
        left = {
            node: (removed[node] or emptied[node])["error"]
            for node in nodes
            if (removed[node] or emptied[node]) and "error" not in written[node]
        }
        probes = [Probe(node, names[node], whose[node], written[node], read[node]) for node in nodes]
        return judge_storage(url, num_bytes, probes, left)

    def _everywhere(self, function: str, arguments: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
        """On all nodes at once, and then here."""
        calls: dict[Any, Any] = {node: (node, function, own) for node, own in arguments.items() if node != HERE}
        answers = self._nodes.ask(calls, 60.0)
        found = {node: {"error": own.reason} if isinstance(own, Failed) else own for node, own in answers.items()}
        return {HERE: getattr(storage_probe, function)(*arguments[HERE]), **found}


def _outcome(one: Any, other: Any) -> list[float] | str:
    for answer in (one, other):
        if isinstance(answer, Failed):
            return answer.reason
    return list(one)
