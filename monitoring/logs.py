"""Log records of the processes of a run: set up here for a process, and read back line by line.

Every process writes a file of its own below the run directory's `logs/`, one line per record, as text or JSON, so that
`grep` works on it and `orchestrator logs` can merge the files by time. Each record says what it is about: run, process,
worker, rank, generation, step. Knows nothing of Ray or torch, nor who writes what.
"""

from __future__ import annotations

import contextlib
import io
import logging
import logging.handlers
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from monitoring import values
from monitoring.outside import json_text, parse
from monitoring.redaction import redact

log = logging.getLogger(__name__)

Form = Literal["text", "json"]
LOGGERS = ("orchestrator", "strategies", "monitoring", "py.warnings")
LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_BYTES = 16 << 20
BACKUPS = 2
"""Beside the file that is written: 48 MB for a process at most."""


@dataclass
class LogContext:
    """What a process's records are about. The owner sets the attributes as it goes, from any thread; a record takes
    what they are at its time. Nothing else happens when they are set, so that a step can afford it."""

    run: str = ""
    process: str = ""
    """worker-0.0, controller-1, driver: also the name of the file."""
    worker: int | None = None
    rank: int | None = None
    generation: int | None = None
    step: int | None = None


_CONTEXT_FIELDS = tuple(LogContext.__dataclass_fields__)


class ContextFilter(logging.Filter):
    """Puts the context on every record."""

    def __init__(self, context: LogContext) -> None:
        super().__init__()
        self._context = context

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.update(asdict(self._context))
        return True


class TextFormatter(logging.Formatter):
    """`2026-08-02T22:21:51.123Z INFO [run=.. process=.. worker=.. rank=.. generation=.. step=..] logger: message`.

    What does not apply is left out of the brackets. Line breaks (of a traceback, say) are written as `\\n`.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)  # the message and the traceback
        about = " ".join(
            f"{name}={value}" for name in _CONTEXT_FIELDS if (value := getattr(record, name, None)) not in (None, "")
        )
        at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        return f"{at}Z {record.levelname} [{about}] {record.name}: {_fold(redact(text))}"


class JsonFormatter(logging.Formatter):
    """One JSON object: time (seconds since the epoch), level, logger, message, exception (if any), and the context."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        content |= {name: getattr(record, name, None) for name in _CONTEXT_FIELDS}
        return json_text(content)


class _ShortFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _fold(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def _unfold(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "r": "\r"}.get(found[1], found[1]), text)


def set_up(
    directory: Path | None, context: LogContext, *, form: Form = "text", level: str = "info", echo: bool = False
) -> Callable[[], None]:
    """Sends this process's records to `directory`/`context.process`.log, and uncaught exceptions and warnings with
    them. With `echo`, warnings and worse also go to stderr. Returns what undoes it all.

    `directory` None, or one that cannot be made or written from here (another node's disk): stderr gets all, and one
    warning says so.
    """
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    handlers: list[logging.Handler] = []
    problem: str | None = None
    if directory is not None:
        try:
            directory.mkdir(exist_ok=True)  # not its parents: where there is no run directory, none is made
            file = logging.handlers.RotatingFileHandler(
                directory / f"{context.process}.log", maxBytes=MAX_BYTES, backupCount=BACKUPS,
                encoding="utf-8", errors="backslashreplace",
            )  # fmt: skip
            file.setFormatter(formatter)
            handlers.append(file)
        except OSError as error:
            problem = f"the run directory's logs cannot be written from here ({error}); this process logs to stderr"
    if echo or not handlers:
        stderr = logging.StreamHandler()
        stderr.setFormatter(formatter)
        if handlers:
            stderr.setLevel(logging.WARNING)
            stderr.setFormatter(_ShortFormatter("%(levelname)s %(name)s: %(message)s"))
        handlers.append(stderr)
    for handler in handlers:
        handler.addFilter(ContextFilter(context))
    undo = _attach(handlers, level)
    if problem is not None:
        log.warning("%s", problem)
    return undo


def _attach(handlers: list[logging.Handler], level: str) -> Callable[[], None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level.upper())
        for handler in handlers:
            logger.addHandler(handler)
    hook, thread_hook = sys.excepthook, threading.excepthook

    def uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, Exception):  # what ends a process on purpose is no news
            logging.getLogger(LOGGERS[0]).critical("uncaught exception", exc_info=(kind, error, trace))
        with _redacted_stderr():
            hook(kind, error, trace)

    def uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
        if issubclass(arguments.exc_type, Exception) and arguments.exc_value is not None:
            name = "?" if arguments.thread is None else arguments.thread.name
            logging.getLogger(LOGGERS[0]).critical(
                "uncaught exception in thread %s", name,
                exc_info=(arguments.exc_type, arguments.exc_value, arguments.exc_traceback),
            )  # fmt: skip
        with _redacted_stderr():
            thread_hook(arguments)

    sys.excepthook, threading.excepthook = uncaught, uncaught_in_thread
    logging.captureWarnings(True)

    def undo() -> None:
        logging.captureWarnings(False)
        if sys.excepthook is uncaught:
            sys.excepthook = hook
        if threading.excepthook is uncaught_in_thread:
            threading.excepthook = thread_hook
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            with suppress(OSError):
                handler.close()  # It may have kept what a full disk did not take.

    return undo


@contextmanager
def _redacted_stderr() -> Iterator[None]:
    """What is written to stderr in the block comes there without secrets, when it is over."""
    held = io.StringIO()
    with contextlib.redirect_stderr(held):
        yield
    sys.stderr.write(redact(held.getvalue()))


@contextmanager
def logging_to(directory: Path | None, context: LogContext, **options: Any) -> Iterator[None]:
    """`set_up` for the length of the block."""
    undo = set_up(directory, context, **options)
    try:
        yield
    finally:
        undo()


# ------------------------------------------------------------------------------------------------ reading back


@dataclass(frozen=True)
class LogRecord:
    """A record as it was written. `time` in seconds since the epoch; `level` "" for a line of plain output."""

    time: float
    level: str
    message: str
    file: str
    logger: str = ""
    run: str = ""
    process: str = ""
    worker: int | None = None
    rank: int | None = None
    generation: int | None = None
    step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z ([A-Z]+) \[(.*?)\] ([\w.<>-]+): (.*)", re.DOTALL)
_ABOUT = re.compile(rf" (?=(?:{'|'.join(_CONTEXT_FIELDS)})=)")  # the name of a run may have spaces
_NUMBERS = ("worker", "rank", "generation", "step")


_JSON_LINE = values.fields(
    {"time": values.seconds, "level": values.text, "message": values.text, "logger": values.text},
    exception=values.maybe(values.text), run=values.maybe(values.text), process=values.maybe(values.text),
    **{name: values.maybe(values.whole) for name in _NUMBERS},
)  # fmt: skip


def parse_line(line: str, file: str) -> LogRecord | None:
    """The record that a line of `file` holds, in either form; None when it is not one of ours."""
    if line.startswith("{"):
        return _parse_json(line, file)
    if (found := _LINE.fullmatch(line)) is None:
        return None
    about: dict[str, Any] = dict(part.partition("=")[::2] for part in _ABOUT.split(found[3]))
    try:
        at = datetime.strptime(found[1], "%Y-%m-%dT%H:%M:%S.%f").replace(tzinfo=UTC).timestamp()
        if values.seconds(at) is not None:
            return None
        about |= {name: int(about[name]) for name in _NUMBERS if name in about}
        return LogRecord(at, found[2], _unfold(found[5]), file, logger=found[4], **about)
    except (TypeError, ValueError):
        return None


def _parse_json(line: str, file: str) -> LogRecord | None:
    try:
        content = parse(line)
        if _JSON_LINE(content) is not None:
            return None
        message = content["message"] + (f"\n{content['exception']}" if content.get("exception") else "")
        about = {name: content.get(name) for name in _CONTEXT_FIELDS}
        return LogRecord(content["time"], content["level"], message, file, logger=content["logger"], **about)
    except (ValueError, KeyError, TypeError, ArithmeticError):
        return None


def describe(record: LogRecord) -> str:
    """A record for a reader: local time, level, who and where, message; a traceback below it on lines of its own."""
    at = datetime.fromtimestamp(record.time).strftime("%H:%M:%S.%f")[:-3]
    if not record.level:
        return f"{at} {record.file}: {record.message}"
    about = [record.process or record.file]
    about += [
        f"{name} {value}"
        for name, value in (("rank", record.rank), ("gen", record.generation), ("step", record.step))
        if value is not None
    ]
    return f"{at} {record.level:<8} {' '.join(about)}: {record.message}"
