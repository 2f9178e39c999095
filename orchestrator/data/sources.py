"""Where the text comes from: a job's `data.source` becomes an ordered list of files.

Names are relative to the source, so that two machines that hold the same files under different directories
agree on the order and on the token store built from them. Knows nothing of tokens.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

STANDARD_LIBRARY = "python-stdlib"

_FORMATS = ("text", "jsonl", "parquet")
_SUFFIXES = {
    **dict.fromkeys([".txt", ".text", ".md", ".rst", ".py", ".pyi", ".tex", ".html", ".xml", ".csv"], "text"),
    **dict.fromkeys([".c", ".h", ".cc", ".cpp", ".hpp", ".go", ".rs", ".java", ".js", ".ts", ".sh"], "text"),
    **dict.fromkeys([".jsonl", ".ndjson"], "jsonl"),
    ".parquet": "parquet",
}
# Test packages are left out because slim images and distributions strip them, so that the same Python version
# gives the same text in most places; the build's own configuration is left out because it differs from build
# to build.
_STDLIB_SKIPPED = frozenset(["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"])
_STDLIB_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


class DataError(ValueError):
    """The data a job names cannot be used; the message says what, where, and what to do about it."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    name: where it is relative to the source (machine-independent, unique in the source, decides the order);
    url: local path or fsspec URL; size_bytes: its size, -1 when a remote end does not say; format: text,
    jsonl or parquet.
    """

    name: str
    url: str
    size_bytes: int
    format: str


def resolve_files(
    source: str | list[str],
    format: str | None = None,
    size_elsewhere: Callable[[str], int | None] = lambda name: None,
) -> list[SourceFile]:
    """The files of a source in their order.

    source: `python-stdlib`, or a path, directory (all its files, hidden ones aside), glob (`**` allowed) or
    fsspec URL, or a list of those, kept in the list's order. format: text, jsonl or parquet for every file,
    or None to infer it from each file's suffix. size_elsewhere: the size in bytes (-1: not known) of a file of
    some name (as in SourceFile) in another place, or None; asked for a file that the source names outright and
    that is not there. What a directory or pattern holds is never told by another place: it may hold more, or less.

    Raises DataError when nothing is found, a file is empty or listed twice, or its format is unknown.
    """
    if format is not None and format not in _FORMATS:
        raise DataError(f"data.format: {format!r} is unknown; use one of {', '.join(_FORMATS)}")
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("data.source: the list is empty; name at least one path, glob or URL")
    files: list[SourceFile] = []
    for position, one in enumerate(sources):
        # With several sources the place in the list leads the name: it keeps names unique and the user's
        # order.
        prefix = f"{position:04d}/" if len(sources) > 1 else ""
        try:
            found = sorted(_find(one, format))
        except DataError:
            found = _named_outright(one, prefix, format, size_elsewhere)
            if not found:
                raise
        files += [_source_file(prefix + name, url, size, format) for name, url, size in found]
    urls: set[str] = set()
    for file in files:
        if file.url in urls:
            raise DataError(
                f"data.source: {file.url} is listed twice, so its samples would be used twice an epoch; "
                "remove one of the overlapping entries"
            )
        urls.add(file.url)
    return files


def _find(source: str, format: str | None) -> list[tuple[str, str, int]]:
    """(name, url, size in bytes) of every file of one source, in any order."""
    if source == STANDARD_LIBRARY:
        if format not in (None, "text"):
            raise DataError(f"data.format: {STANDARD_LIBRARY} is text, not {format}; leave data.format out")
        return _standard_library()
    if source.startswith("file://"):
        source = source.removeprefix("file://")
    found = _find_remote(source) if "://" in source else _find_local(os.path.expanduser(source))
    if not found:
        raise DataError(f"data.source: nothing found at {source!r} (working directory {os.getcwd()}); check the path")
    return found


def _named_outright(
    source: str, prefix: str, format: str | None, size_elsewhere: Callable[[str], int | None]
) -> list[tuple[str, str, int]]:
    """What `_find` would have found of a file that is in another place only."""
    source = source.removeprefix("file://")
    name = source.rsplit("/", 1)[-1]
    if glob.has_magic(source) or (format is None and os.path.splitext(name)[1].lower() not in _SUFFIXES):
        return []
    size_bytes = size_elsewhere(prefix + name)
    url = source if "://" in source else os.path.abspath(os.path.expanduser(source))
    return [] if size_bytes is None else [(name, url, size_bytes)]


def _find_local(source: str) -> list[tuple[str, str, int]]:
    if os.path.isfile(source):
        paths, root = [source], os.path.dirname(source)
    elif os.path.isdir(source):
        paths, root = list(_walk(source, lambda name: name.startswith("."))), source
    else:
        paths, root = [p for p in glob.glob(source, recursive=True) if os.path.isfile(p)], _glob_root(source)
    return [_local(path, root) for path in paths]


def _local(path: str, root: str) -> tuple[str, str, int]:
    name = os.path.relpath(path, root or ".").replace(os.sep, "/")
    try:
        return name, os.path.abspath(path), os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _walk(root: str, skipped: Any) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error}") from error

    for directory, directories, names in os.walk(root, onerror=refuse, followlinks=True):
        directories[:] = [name for name in directories if not skipped(name)]
        yield from (os.path.join(directory, name) for name in names if not skipped(name))


def _glob_root(pattern: str) -> str:
    """The directory above the first part of a pattern that holds a wildcard."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")


def _standard_library() -> list[tuple[str, str, int]]:
    root = sysconfig.get_path("stdlib")

    def skipped(name: str) -> bool:
        # config-3.11-x86_64-linux-gnu and its like hold the interpreter's build configuration.
        return name in _STDLIB_SKIPPED or name.startswith((*_STDLIB_SKIPPED_FILES, "config-"))

    files = [_local(path, root) for path in _walk(root, skipped) if path.endswith(".py")]
    files = [file for file in files if file[2] > 0]  # empty __init__.py files are no documents
    if not files:
        raise DataError(f"data.source: {STANDARD_LIBRARY} has no .py files under {root}; name another source")
    return files


def _find_remote(url: str) -> list[tuple[str, str, int]]:
    filesystem, path = filesystem_of(url)
    is_web = url.startswith(("http://", "https://"))  # where ? belongs to the query
    magic = "*" in path or (not is_web and glob.has_magic(path))
    try:
        if magic:
            found, root = filesystem.glob(path, detail=True), _glob_root(path)
        elif filesystem.info(path)["type"] == "directory":
            found, root = filesystem.find(path, detail=True), path
        else:
            found, root = {path: filesystem.info(path)}, path.rsplit("/", 1)[0] if "/" in path else ""
    except FileNotFoundError:
        return []
    except Exception as error:  # every storage library has its own errors: name the URL in each
        raise DataError(f"data.source: {url} cannot be listed: {type(error).__name__}: {error}") from error
    files = [(p, info) for p, info in found.items() if info.get("type") != "directory"]
    prefix = root.rstrip("/") + "/" if root else ""
    named = [(p.removeprefix(prefix), p, info.get("size")) for p, info in files]
    return [(name, filesystem.unstrip_protocol(p), -1 if size is None else int(size)) for name, p, size in named]


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises DataError when its driver is not installed."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the driver for s3://, gs:// ... is a package of its own
        raise DataError(f"data.source: {url} cannot be opened: {error}") from error
    return filesystem, path


def _source_file(name: str, url: str, size_bytes: int, format: str | None) -> SourceFile:
    suffix = os.path.splitext(name)[1].lower()
    inferred = format or _SUFFIXES.get(suffix)
    if inferred is None:
        raise DataError(
            f"{url}: cannot tell its format from the suffix {suffix!r}; set data.format to one of "
            f"{', '.join(_FORMATS)}, or leave the file out of data.source"
        )
    if size_bytes == 0:
        raise DataError(f"{url}: the file is empty; remove it from data.source")
    return SourceFile(name=name, url=url, size_bytes=size_bytes, format=inferred)
