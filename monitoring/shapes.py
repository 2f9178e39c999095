"""How the records and small files of a run must look for its readers to rely on them.

Only what readers need is asked for: other fields may be of a later version, and pass. Events have a schema of their own
(`monitoring.events`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitoring.events import LAYOUT, NAMED, RECOVERY, check_of
from monitoring.outside import Check
from monitoring.values import (
    anything,
    both,
    by_name,
    count,
    fields,
    flag,
    many,
    maybe,
    number,
    seconds,
    text,
    thing,
    whole,
)

# ---------------------------------------------------------------------------------------- metrics.jsonl


def _rank(value: Any) -> str | None:
    """What a rank spent on a step: seconds by virtual worker, then numbers."""
    if not isinstance(value, list) or len(value) < 2 or many(seconds)(value[0]) is not None:
        return "is no account of a rank"
    return many(number)(value[1:])


STEP = fields(
    {"step": count, "generation": whole, "loss": maybe(number), "tokens": count, "committed_at": seconds,
     "seconds": seconds, "grad_norm": maybe(number), "lr": number, "skipped": flag, "phase_seconds": by_name(seconds)},
    samples=text, padding=count, deal=count, ranks=many(_rank), wire_bytes=by_name(count),
    round_steps=count,
)  # fmt: skip

# ---------------------------------------------------------------------------------------- events.jsonl

_EVENT = fields({"time": seconds, "kind": text}, clock=seconds)


def event(value: Any) -> str | None:
    """A record of events.jsonl."""
    if (wrong := _EVENT(value)) is not None:
        return wrong
    check = check_of(value["kind"])
    return None if check is None else check(value)


# ---------------------------------------------------------------------------------------- small files

_GOODPUT = fields({"wall_seconds": seconds, "productive_seconds": seconds, "badput_seconds": by_name(seconds)})
_GPU = fields(
    {"slowed_by": many(text)}, utilization=maybe(number), sm_hertz=maybe(number), celsius=maybe(number),
    watts=maybe(number), free_bytes=maybe(count), corrected=maybe(count), uncorrected=maybe(count), at_power_limit=flag,
)  # fmt: skip
_WORKER = fields(
    NAMED, node=maybe(text), pid=maybe(count), state=text, rank=maybe(count), coordinates=maybe(by_name(count)),
    phase=maybe(text), heartbeat=maybe(seconds), speed=maybe(number), own_speed=maybe(number),
    wait_share=maybe(number), step_seconds=maybe(seconds), virtual_workers=maybe(count), host_bytes=maybe(count),
    device_bytes=maybe(count), leaving=maybe(flag), finding=maybe(text), gpu=maybe(_GPU),
)  # fmt: skip
STATUS = fields(
    {}, time=seconds, run=text, name=text, over=flag, state=text, detail=maybe(text), status=maybe(text),
    step=count, steps=count, median_step_seconds=maybe(seconds), tokens=count, tokens_per_second=maybe(number),
    loss=maybe(number), grad_norm=maybe(number), lr=maybe(number), mfu=maybe(number), generation=maybe(whole),
    layout=maybe(LAYOUT), target=maybe(count), min=maybe(count), max=maybe(count), workers=maybe(many(_WORKER)),
    incidents=fields(
        {}, total=count, open=many(fields({"incident": text, "worker": maybe(count), "cause": text}, at=maybe(seconds)))
    ),
    checkpoint=maybe(fields({}, committed=maybe(count), time=maybe(seconds), saving=maybe(flag))),
    last_recovery=maybe(thing), goodput=maybe(_GOODPUT), counters=by_name(number), metrics_url=maybe(text),
    findings=maybe(many(fields({"finding": text}, workers=many(count), detail=text))),
)  # fmt: skip
RESULT = fields(
    {"status": text}, run=text, reason=maybe(text), steps=count, tokens=count, final_loss=maybe(number),
    wall_seconds=seconds, goodput_ratio=number, median_step_seconds=maybe(seconds), bit_exact=anything,
    state_digest=maybe(text), data_digest=maybe(text), generations=many(thing),
    recoveries=many(both(RECOVERY, fields({"kind": text}))),
    faults_not_fired=many(count),
)  # fmt: skip
SINK = fields({}, committed_at=maybe(seconds), step=count, events=count, memory=thing)
JOB = fields(
    {},
    name=text,
    train=fields({}, steps=maybe(count), log_every=count),
    elastic=fields({}, workers=fields({"min": count, "max": count})),
)
FORK = fields({"step": count, "url": text, "run": text})
ENVIRONMENT = fields(
    {}, data=thing, store=fields({"digest": text, "tokens": count}), held_out=many(text), packages=by_name(text)
)

LINES: Mapping[str, Check] = {"events.jsonl": event, "metrics.jsonl": STEP}
"""What each line must be, by the name of the file."""
SMALL_FILES: Mapping[str, Check] = {
    "status.json": STATUS, "result.json": RESULT, "job.resolved.json": JOB, "fork.json": FORK,
    "environment.json": ENVIRONMENT,
}  # fmt: skip
