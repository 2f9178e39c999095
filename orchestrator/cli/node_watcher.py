"""`orchestrator node-watcher`: one small process per node that turns a notice into a Ray drain of the node."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.notices.notice import Source
    from orchestrator.runtime.ray.node_watcher.watch import Drain

log = logging.getLogger("orchestrator.node-watcher")


@dataclass(frozen=True)
class WatchOptions:
    """What is watched, and how; times in seconds."""

    source: str
    source_url: str | None
    notice_file: Path | None
    poll_s: float
    lead_s: float
    early: bool


def node_watcher(
    options: WatchOptions, address: str | None, node_id: str | None, grace_s: float, command: Sequence[str]
) -> int:  # fmt: skip
    """Watches until SIGTERM or SIGINT, or, with a `command`, until that has ended; returns the exit code.

    Raises NoticeError when there is no such source or command.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s node-watcher: %(message)s", force=True
    )  # fmt: skip
    from orchestrator.notices.sources import AUTO, NONE, make_source
    from orchestrator.runtime.ray.node_watcher.local import ThisNode
    from orchestrator.runtime.ray.node_watcher.wrapper import Wrapped

    named = None if options.source in (AUTO, NONE) else make_source(options.source, options.source_url)
    stopped = threading.Event()
    if command:
        wrapped = Wrapped(command, grace_s)
        node = ThisNode(address, node_id, parent=wrapped.pid)
        watching = threading.Thread(target=_watch, args=(options, named, node.drain, stopped), daemon=True)
        watching.start()
        code = wrapped.run(node)
        stopped.set()
        return code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    watched = _watch(options, named, ThisNode(address, node_id).drain, stopped)
    return 0 if watched or stopped.is_set() else 1


def _watch(options: WatchOptions, named: Source | None, drain: Drain, stopped: threading.Event) -> bool:
    """Watches until `stopped`; whether there was anything to watch."""
    from orchestrator.notices.file import NoticeFile
    from orchestrator.notices.sources import AUTO, detect, known
    from orchestrator.runtime.ray.node_watcher.watch import Watcher
    from orchestrator.runtime.ray.nodes import prepare

    prepare()
    if options.source == AUTO:
        named = detect(options.source_url, stopped)
        if named is not None:
            log.info("found the metadata service of %s", named.name)
        elif not stopped.is_set():
            log.warning("no metadata service answers (tried %s); name one with --source", ", ".join(known()))
    sources = [named] if named is not None else []
    if options.notice_file is not None:
        sources.append(NoticeFile(options.notice_file))
    if not sources:
        if not stopped.is_set():
            log.warning("nothing is watched but signals to the command, if one was given")
        return False
    log.info("watching %s every %g s", ", ".join(source.name for source in sources), options.poll_s)
    Watcher(sources, drain, poll_s=options.poll_s, lead_s=options.lead_s, early=options.early).run(stopped)
    return True
