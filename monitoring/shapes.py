"""How the records and small files of a run must look for its readers to rely on them.

A check says what is wrong with a value, or None. Only what readers need is asked for: other fields and kinds of events
may be of a later version, and pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitoring.outside import Check

MOST_S = 1e11
"""Seconds; as a time it is in the year 5138. Beyond lie errors of the functions that show times."""
MOST = 1 << 63


def count(value: Any) -> str | None:
    """A whole number from 0 on, of 63 bits."""
    return None if type(value) is int and 0 <= value < MOST else "is no count"


def whole(value: Any) -> str | None:
    return None if type(value) is int and -MOST < value < MOST else "is no whole number"


def number(value: Any) -> str | None:
    """Of a size that sums and squares of it are finite, too."""
    return None if type(value) in (int, float) and -1e100 < value < 1e100 else "is no number"


def seconds(value: Any) -> str | None:
    """A length of time or a time; a bit below 0 is what clocks of two machines make of a short one."""
    return None if type(value) in (int, float) and -MOST_S < value < MOST_S else "is no time"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "is no text"


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is neither true nor false"


def thing(value: Any) -> str | None:
    return None if isinstance(value, dict) else "is no object"


def anything(_value: Any) -> None:
    return None


def maybe(check: Check) -> Check:
    """Or null."""
    return lambda value: None if value is None else check(value)


def many(check: Check) -> Check:
    """A list of such."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, list):
            return "is no list"
        for index, item in enumerate(value):
            if (wrong := check(item)) is not None:
                return _inside(f"[{index}]", wrong)
        return None

    return checked


def by_name(check: Check) -> Check:
    """An object of such."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "is no object"
        for name, item in value.items():
            if (wrong := check(item)) is not None:
                return _inside(f".{name[:40]}", wrong)
        return None

    return checked


def fields(needed: Mapping[str, Check], **optional: Check) -> Check:
    """An object that has the `needed` fields, and of the others those that it has as they should be."""
    known = [(name, check, name in needed) for name, check in (dict(needed) | optional).items()]

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "is no object"
        for name, check, is_needed in known:
            if name not in value:
                if is_needed:
                    return f"has no {name}"
            elif (wrong := check(value[name])) is not None:
                return _inside(f".{name}", wrong)
        return None

    return checked


def _inside(place: str, wrong: str) -> str:
    separator = "" if wrong.startswith((".", "[")) else " "
    return f"{place}{separator}{wrong}"


# ---------------------------------------------------------------------------------------- metrics.jsonl


def _rank(value: Any) -> str | None:
    """What a rank spent on a step: seconds by virtual worker, then numbers."""
    if not isinstance(value, list) or len(value) < 2 or many(seconds)(value[0]) is not None:
        return "is no account of a rank"
    return many(number)(value[1:])


STEP = fields(
    {"step": count, "generation": whole, "loss": maybe(number), "tokens": count, "committed_at": seconds,
     "seconds": seconds, "grad_norm": maybe(number), "lr": number, "skipped": flag, "phase_seconds": by_name(seconds)},
    samples=text, padding=count, deal=count, ranks=many(_rank),
)  # fmt: skip

# ---------------------------------------------------------------------------------------- events.jsonl

_MEMBER = fields({"worker": count, "incarnation": count}, node=maybe(text), pid=maybe(count))
_LAYOUT = fields({}, data=count, tensor=count, pipeline=count, shard=maybe(text))
_DIVIDED = by_name(seconds)
_NAMED: Mapping[str, Check] = {"worker": count, "incarnation": count}
_INCIDENT: Mapping[str, Check] = {
    "incident": text, "worker": maybe(count), "cause": text, "step": count, "at": seconds,
    "detect_seconds": seconds,
}  # fmt: skip
_RECOVERY = fields(
    {"worker": maybe(count), "step": count, "detect_seconds": seconds, "stall_seconds": seconds,
     "steps_lost": count, "bytes_moved": count, "source": text},
    incident=text, kind=text, cause=text, at=seconds, pause_seconds=seconds, generation=maybe(whole),
)  # fmt: skip
_STRETCH = fields(
    {"first": count, "last": count, "generation": whole, "began": seconds, "ended": seconds, "seconds": _DIVIDED},
    tokens=count,
)  # fmt: skip
_LOST = fields({"step": count}, seconds=seconds, phase_seconds=_DIVIDED, tokens=count, skipped=flag)
_FINDING: Mapping[str, Check] = {"finding": text, "workers": many(count)}


def _both(*checks: Check) -> Check:
    return lambda value: next((wrong for check in checks if (wrong := check(value)) is not None), None)


_BY_KIND: Mapping[str, Check] = {
    "run_started": fields({}, run=text, job=text, steps=count, min_workers=count, loss_unit=text),
    "controller": fields({"session": maybe(text)}, epoch=count, pid=count, boot=text, clock_shift=number),
    "metrics_endpoint": fields({"url": text}),
    "worker_placed": fields(_NAMED, node=maybe(text)),
    "worker_ready": fields(
        {**_NAMED, "pid": count}, node=maybe(text), start_seconds=seconds, flops_per_token=number, peak_flops=number
    ),
    "worker_died": fields(_NAMED),
    "worker_killed": fields(_NAMED),
    "worker_released": fields(_NAMED),
    "waiting": fields({"needed": count}, workers=count),
    "generation": fields(
        {"generation": whole, "start_step": count, "cause": text, "workers": many(_MEMBER), "layout": _LAYOUT},
        restore=maybe(text), source=maybe(text), steps_lost=count, collect=flag,
    ),
    "generation_running": fields({}, generation=whole),
    "incident": fields(_INCIDENT, incarnation=maybe(count)),
    "recovery": _both(_RECOVERY, fields({"incident": text, "at": seconds})),
    "steps": _STRETCH,
    "rollback": fields(
        {"committed": count, "steps": count, "seconds": _DIVIDED}, tokens=count, lost=many(_LOST)
    ),
    "checkpoint_saved": fields({"committed": count, "bytes": count, "seconds": seconds}, blocked_seconds=seconds),
    "checkpoint_failed": fields({"committed": count, "error": text}),
    "checkpoint_invalid": fields({"path": text, "reason": text}),
    "checkpoint_delayed": fields({"committed": count}),
    "skew_found": fields({**_FINDING, "detail": text}),
    "skew_over": fields(_FINDING),
    "fault_injected": fields({"fault": count}, worker=maybe(count), at=seconds),
    "request_answered": fields({"id": text}, error=text),
    "stop_requested": fields({"reason": text}),
    "run_finished": fields({"status": text}, reason=maybe(text)),
}  # fmt: skip
"""What readers rely on of each kind; a line of text that is made of others is passed over where it cannot be made."""

_EVENT = fields({"time": seconds, "kind": text}, clock=seconds)


def event(value: Any) -> str | None:
    """A record of events.jsonl."""
    if (wrong := _EVENT(value)) is not None:
        return wrong
    check = _BY_KIND.get(value["kind"])
    return None if check is None else check(value)


# ---------------------------------------------------------------------------------------- small files

_GOODPUT = fields({"wall_seconds": seconds, "productive_seconds": seconds, "badput_seconds": _DIVIDED})
_WORKER = fields(
    _NAMED, node=maybe(text), pid=maybe(count), state=text, rank=maybe(count), coordinates=maybe(by_name(count)),
    phase=maybe(text), heartbeat=maybe(seconds), speed=maybe(number), own_speed=maybe(number),
    wait_share=maybe(number), step_seconds=maybe(seconds), virtual_workers=maybe(count), host_bytes=maybe(count),
    device_bytes=maybe(count), leaving=maybe(flag), finding=maybe(text),
)  # fmt: skip
STATUS = fields(
    {}, time=seconds, run=text, name=text, over=flag, state=text, detail=maybe(text), status=maybe(text),
    step=count, steps=count, median_step_seconds=maybe(seconds), tokens=count, tokens_per_second=maybe(number),
    loss=maybe(number), grad_norm=maybe(number), lr=maybe(number), mfu=maybe(number), generation=maybe(whole),
    layout=maybe(_LAYOUT), target=maybe(count), min=maybe(count), max=maybe(count), workers=maybe(many(_WORKER)),
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
    recoveries=many(_both(_RECOVERY, fields({"kind": text}))),
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
ENVIRONMENT = fields({}, data=thing, store=fields({"digest": text, "tokens": count}), packages=by_name(text))

LINES: Mapping[str, Check] = {"events.jsonl": event, "metrics.jsonl": STEP}
"""What each line must be, by the name of the file."""
SMALL_FILES: Mapping[str, Check] = {
    "status.json": STATUS, "result.json": RESULT, "job.resolved.json": JOB, "fork.json": FORK,
    "environment.json": ENVIRONMENT,
}  # fmt: skip
