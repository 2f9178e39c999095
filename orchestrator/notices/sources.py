"""Which sources of notices there are, and which this machine has."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator import plugins
from orchestrator.errors import PluginError
from orchestrator.notices.aws import Aws
from orchestrator.notices.azure import Azure
from orchestrator.notices.gcp import Gcp
from orchestrator.notices.notice import NoticeError, Source

log = logging.getLogger(__name__)

Factory = Callable[[str | None], Source]

SOURCES: Mapping[str, Factory] = {"aws": Aws, "gcp": Gcp, "azure": Azure}
"""By the name that `--source` takes; made with the base URL of the service, None for its own."""
PLUGINS = "notice_sources"
"""Other packages' sources, made like ours."""
AUTO, NONE = "auto", "none"
_TRIES = 5
_PAUSE_S = 3.0


def known() -> list[str]:
    """The names of ours, and of those that installed packages bring."""
    return plugins.names(PLUGINS, SOURCES)


def make_source(name: str, base_url: str | None) -> Source:
    """The source of a name in `SOURCES`, or that an installed package has under this name, or of `package.module:Class`
    (see `Source` for what the class must have).

    Raises NoticeError.
    """
    if name in SOURCES:
        return SOURCES[name](base_url)
    module_name, colon, class_name = name.partition(":")
    if not colon:
        if name not in known():
            listed = ", ".join([AUTO, *known(), NONE])
            raise NoticeError(f"--source {name}: choose one of {listed}, or give package.module:Class")
        return _of_package(name, base_url)
    try:
        made = getattr(importlib.import_module(module_name), class_name)(base_url)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise NoticeError(f"--source {name}: {type(error).__name__}: {error}; is it on PYTHONPATH?") from error
    return _checked(name, made)


def _of_package(name: str, base_url: str | None) -> Source:
    try:
        return _checked(name, plugins.find_callable(PLUGINS, name, SOURCES)(base_url))
    except (PluginError, NoticeError) as error:
        raise NoticeError(f"--source {name}: {error}") from error
    except Exception as error:  # A package of somebody else's can fail with anything.
        raise NoticeError(f"--source {name}: {type(error).__name__}: {error}") from error


def _all(base_url: str | None) -> Iterator[Source]:
    """Ours, and those of other packages that can be made."""
    for name in known():
        try:
            yield make_source(name, base_url)
        except NoticeError as error:
            log.warning("it is not asked for notices: %s", error)


def _checked(name: str, made: Any) -> Source:
    missing = [what for what in ("name", "detect", "poll") if not hasattr(made, what)]
    if missing:
        raise NoticeError(f"--source {name}: it has no {', '.join(missing)}; see orchestrator.notices.notice")
    return made  # type: ignore[no-any-return]


def detect(
    base_url: str | None, stopped: threading.Event, tries: int = _TRIES, pause_s: float = _PAUSE_S
) -> Source | None:  # fmt: skip
    """The first source that answers here, or None after some tries: at boot, the network may not be up yet."""
    candidates = list(_all(base_url))
    for attempt in range(tries):
        if attempt and stopped.wait(pause_s):
            return None
        for candidate in candidates:
            try:
                if candidate.detect():
                    return candidate
            except Exception as error:
                # Ours raise SourceError, OSError and ValueError where they are not; others', anything.
                log.debug("%s: %s: %s", candidate.name, type(error).__name__, error)
    return None
