"""The status of a run, as labelled lines: the one place that says what `status`, `watch` and `run` show of it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from monitoring.evaluations import as_text as metrics_text
from monitoring.follow import describe_recovery, summary
from monitoring.terminal.clean import clean
from monitoring.terminal.facts import Json, RunFacts

Lines = list[tuple[str, str]]

LABEL_WIDTH = 11
WORKERS_SHOWN = 32
"""With more than these there is a line for each node instead of one for each worker."""
LOSSES_SHOWN = 3
RECOVERIES_SHOWN = 5


def status_lines(facts: RunFacts, alive: bool, now: float | None = None) -> Lines:
    """Label and text of every line. `now` in seconds since the epoch."""
    now = facts.now() if now is None else now
    lines = [("run", str(facts.run_dir)), ("state", _state(facts, alive))]
    lines += [("damaged", problem) for problem in facts.damaged]
    if facts.result is not None and not alive:
        lines += [(line[:LABEL_WIDTH].strip(), line[LABEL_WIDTH:]) for line in _closing(facts)]
        return lines + goodput_lines(facts)
    lines += step_lines(facts)
    lines += evaluation_lines(facts)
    lines += _workers(facts, now) if alive else _last_generation(facts)
    lines += goodput_lines(facts)
    lines += checkpoint_lines(facts, now)
    lines += open_incident_lines(facts, now) if alive else []
    lines += [(str(event["incident"]), _recovery(event)) for event in facts.recoveries[-RECOVERIES_SHOWN:]]
    if not alive:
        lines.append(("next", f"orchestrator resume {facts.run_dir} goes on from the newest checkpoint"))
    return lines


def _recovery(event: Json) -> str:
    who = "by plan" if event["worker"] is None else f"of worker {event['worker']}"
    return f"{who} at step {event['step']}: {describe_recovery(event)}"


def as_text(lines: Lines) -> str:
    return "\n".join(clean(f"{label:<{LABEL_WIDTH}}{text}").rstrip() for label, text in lines)


def _closing(facts: RunFacts) -> list[str]:
    assert facts.result is not None
    return [line for line in summary(facts.result, str(facts.run_dir)) if not line.startswith("files")]


def _state(facts: RunFacts, alive: bool) -> str:
    state = facts.state(alive)
    if alive and facts.live is not None:
        state += f": {describe_state(facts.live)}"
    text = f"{state}, step {facts.step} of {facts.steps}"
    if alive and (left := time_left(facts)):
        text += f", {left}"
    return text


def describe_state(live: Json) -> str:
    """What the controller is at: "running, training", "waiting", ..."""
    state, detail = str(live.get("state", "")), str(live.get("detail") or "")
    return detail if state == "running" and detail else f"{state}, {detail}" if detail and detail != state else state


def time_left(facts: RunFacts) -> str:
    """How long the steps that are left take if all goes well; "" when that cannot be said."""
    if not facts.step_seconds or not facts.steps:
        return ""
    seconds = int(max(0, facts.steps - facts.step) * facts.step_seconds)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02d}:{seconds % 60:02d} left" if hours else f"{minutes}:{seconds % 60:02d} left"


def step_lines(facts: RunFacts) -> Lines:
    """Loss and speed."""
    record = facts.last_step
    if record is None:
        return []
    lines = [("loss", f"{_number(record['loss'])}, gradient norm {_number(record['grad_norm'], 3)}, "
                      f"learning rate {record['lr']:.3g}")]  # fmt: skip
    if facts.tokens_per_second is not None and facts.step_seconds is not None:
        mfu = (facts.live or {}).get("mfu")
        lines.append(
            ("speed", f"{facts.tokens_per_second:,.0f} tokens/s, {facts.step_seconds:.3f} s a step"
                      + (f", {mfu:.1%} of the peak FLOP/s (MFU)" if mfu is not None else ""))
        )  # fmt: skip
    return lines


def evaluation_lines(facts: RunFacts) -> Lines:
    """The newest evaluation, and the best where that is another."""
    last, best = facts.evaluations.last, facts.evaluations.best
    if last is None:
        return []
    text = f"after {last['step']} steps: {metrics_text(last['metrics'])}"
    if last is best:
        text += "; the best so far"
    elif best is not None:
        text += f"; the best was after {best['step']}: {metrics_text(best['metrics'])}"
    return [("evaluation", text)]


def layout_text(facts: RunFacts) -> str:
    """Generation and layout."""
    if facts.generation is None:
        return "none yet"
    layout = facts.layout or {}
    degrees = ", ".join(f"{name} {layout[name]}" for name in ("data", "tensor", "pipeline", "shard") if name in layout)
    return f"{facts.generation['generation']}{degrees and f': {degrees}'}"


def _last_generation(facts: RunFacts) -> Lines:
    if facts.generation is None:
        return []
    return [("generation", f"{layout_text(facts)}; {len(facts.generation['workers'])} workers")]


def counts_text(facts: RunFacts) -> str:
    """How many workers there are, by what they do."""
    counts: dict[str, int] = defaultdict(int)
    for worker in facts.workers:
        counts[worker.get("state", "member")] += 1
    words = {"member": "training", "idle": "standing by", "starting": "starting", "requested": "requested"}
    text = ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state]) or "none"
    if facts.live is not None and facts.live.get("target") is not None:
        text += f"; {facts.live['target']} wanted ({facts.live.get('min')} to {facts.live.get('max')})"
    return text


def _workers(facts: RunFacts, now: float) -> Lines:
    lines = [("generation", layout_text(facts)), ("workers", counts_text(facts))]
    return lines + [("", text) for text in worker_lines(facts, now)]


def worker_lines(facts: RunFacts, now: float) -> list[str]:
    """The workers by node: a line for each, or for each node when they are many."""
    by_node: dict[str, list[Json]] = defaultdict(list)
    for worker in facts.workers:
        by_node[worker.get("node") or ""].append(worker)
    nodes = sorted(by_node.items(), key=lambda entry: min(_order(worker) for worker in entry[1]))
    many = len(facts.workers) > WORKERS_SHOWN
    lines = []
    for node, workers in nodes[:WORKERS_SHOWN] if many else nodes:
        name = f"node {node[:8]}" if node else "no node yet"
        if many:
            lines.append(f"{name}: {_node_text(workers)}")
            continue
        lines.append(name)
        for worker in sorted(workers, key=_order):
            lines.append(f"  {_worker_text(worker, facts.layout or {}, now)}")
    if many and len(nodes) > WORKERS_SHOWN:
        lines.append(f"and {len(nodes) - WORKERS_SHOWN} nodes more")
    return lines


def _order(worker: Json) -> tuple[float, int]:
    rank = worker.get("rank")
    return (float("inf") if rank is None else rank, worker["worker"])


def _node_text(workers: list[Json]) -> str:
    speeds = [worker["speed"] for worker in workers if worker.get("speed") is not None]
    members = sum(worker.get("state") == "member" for worker in workers)
    found = sorted({worker["finding"] for worker in workers if worker.get("finding")})
    return (
        f"{members} of {len(workers)} training"
        + (f", speed {min(speeds):.2f} to {max(speeds):.2f}" if speeds else "")
        + (f", {', '.join(found)}" if found else "")
    )


def _worker_text(worker: Json, layout: Json, now: float) -> str:
    """worker 1.0  rank 1  data 1  training (compute)  speed 0.98  0.094 s of its own a step  ..."""
    name = f"worker {worker['worker']}.{worker.get('incarnation', 0)}"
    rank = worker.get("rank")
    parts = [f"{name:<12}", f"rank {rank:<3}" if rank is not None else f"{'':<8}"]
    coordinates = worker.get("coordinates") or {}
    shown = [f"{axis} {coordinates[axis]}" for axis in ("data", "pipeline", "tensor")
             if axis in coordinates and _degree(layout, axis) > 1]  # fmt: skip
    if shown:
        parts.append(", ".join(shown))
    state = worker.get("state", "member")
    phase = worker.get("phase")
    parts.append(f"{state} ({phase})" if phase and state == "member" else state)
    if worker.get("speed") is not None:
        parts.append(f"speed {worker['speed']:.2f}")
    if worker.get("step_seconds") is not None:
        parts.append(f"{worker['step_seconds']:.3f} s")
    if worker.get("wait_share"):
        parts.append(f"waits {worker['wait_share']:.0%}")
    if worker.get("host_bytes"):
        parts.append(f"{worker['host_bytes'] / 1e9:.1f} GB")
    if worker.get("device_bytes"):
        parts.append(f"GPU {worker['device_bytes'] / 1e9:.1f} GB")
    if slowed_by := (worker.get("gpu") or {}).get("slowed_by"):
        parts.append(f"GPU slowed down by {' and '.join(slowed_by)}")
    if (heard := worker.get("heartbeat")) is not None and now - heard > 3.0:
        parts.append(f"silent for {age(now - heard)}")
    if worker.get("leaving"):
        parts.append("leaving")
    if worker.get("finding"):
        parts.append(str(worker["finding"]))
    return "  ".join(parts).rstrip()


def _degree(layout: Json, axis: str) -> int:
    degree = layout.get(axis, 1)
    return degree if isinstance(degree, int) else 1


def goodput_lines(facts: RunFacts) -> Lines:
    """The share of the time that was training, and what took the most of the rest."""
    account = facts.goodput
    if account is None or not account["wall_seconds"]:
        return []
    text = f"{account['productive_seconds'] / account['wall_seconds']:.1%} of {age(account['wall_seconds'])}"
    losses = sorted(account.get("badput_seconds", {}).items(), key=lambda entry: -entry[1])[:LOSSES_SHOWN]
    told = ", ".join(f"{reason.replace('_', ' ')} {seconds:.1f} s" for reason, seconds in losses if seconds > 0)
    return [("goodput", text + (f"; lost to {told}" if told else ""))]


def checkpoint_lines(facts: RunFacts, now: float) -> Lines:
    found = facts.checkpoint
    if found is None:
        return [("checkpoint", "none yet")] if facts.step else []
    saving = "; another is being written" if found.get("saving") else ""
    if found.get("committed") is None:
        return [("checkpoint", f"none yet{saving}")]
    old = f", {age(now - found['time'])} old" if found.get("time") is not None else ""
    return [("checkpoint", f"{found['committed']} steps{old}{saving}")]


def open_incident_lines(facts: RunFacts, now: float) -> Lines:
    """Incidents that are not over, and what costs time."""
    lines = [
        (
            "incident",
            f"{event['incident']}: {event['cause']} ({age(now - float(event.get('at') or now))} ago)",
        )
        for event in facts.open_incidents
    ]
    for finding in facts.findings:
        who = f" of worker {', '.join(map(str, finding['workers'][:8]))}" if finding.get("workers") else ""
        lines.append(("finding", f"{finding['finding']}{who}: {finding.get('detail', '')}"))
    return lines


def age(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _number(value: Any, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
