"""Where the text comes from: a job's `data.source` becomes an ordered list of files.

Names are relative to the source, so that two machines that hold the same files under different directories
agree on the order and on the token store built from them. Knows nothing of tokens.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from monitoring.errors import UserError
from monitoring.redaction import redact
from orchestrator.urls import UrlProblem, expand

STANDARD_LIBRARY = "python-stdlib"

FORMATS = ("text", "jsonl", "json", "parquet", "csv", "tsv", "arrow", "npy", "bin")
TABLES = ("jsonl", "json", "parquet", "csv", "tsv", "arrow")
"""Those that have records, with fields."""
TOKENS = ("npy", "bin")
"""Those that have the ids of tokens."""
_SUFFIXES = {
    **dict.fromkeys([".txt", ".text", ".md", ".rst", ".py", ".pyi", ".tex", ".html", ".xml"], "text"),
    **dict.fromkeys([".c", ".h", ".cc", ".cpp", ".hpp", ".go", ".rs", ".java", ".js", ".ts", ".sh"], "text"),
    **dict.fromkeys([".jsonl", ".ndjson"], "jsonl"),
    **{f".{name}": name for name in FORMATS if name not in ("text", "jsonl")},
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of files that are read through, whatever they hold."""
_PACKED = (".lz4", ".br", ".zip", ".7z", ".tar", ".tgz")
_OTHERWISE = (
    "set data.format if they all have one format, or leave them out with data.include or a pattern like DIR/**/*.jsonl"
)
_TOLD = 5
# What Hadoop, Spark and Dask leave beside the files of a table, which no reader of such directories takes for data.
_MARKERS = re.compile(r"_SUCCESS|_metadata|_common_metadata|_started_.*|_committed_.*|.*\.crc|.*\.idx")
# What `datasets.save_to_disk` writes beside its .arrow files.
_OF_DATASETS = ("dataset_info.json", "state.json")
_SPLITS = "dataset_dict.json"
_ABOUT = re.compile(r"(readme|license|licence|notice|changelog|contributing|dataset_card)\b", re.IGNORECASE)
# Test packages are left out because slim images and distributions strip them, so that the same Python version
# gives the same text in most places; the build's own configuration is left out because it differs from build
# to build.
_STDLIB_SKIPPED = frozenset(["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"])
_STDLIB_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


class DataError(UserError, ValueError):
    """The data a job names cannot be used; the message says what, where, and what to do about it, and no secret."""

    def __init__(self, text: str = "") -> None:
        super().__init__(redact(text))


class SecretMissing(DataError):
    """A URL names a secret that is not to be had here."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    name: where it is relative to the source (machine-independent, unique in the source, decides the order);
    url: local path or fsspec URL; size_bytes: its size, -1 when a remote end does not say; format: one of FORMATS.
    """

    name: str
    url: str
    size_bytes: int
    format: str

    @property
    def compression(self) -> str:
        """The suffix that says how it is compressed; "" where it is not."""
        suffix = _suffix(self.name)
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def is_standard_library(self) -> bool:
        """Whether it is of the running Python's."""
        return self.url.startswith(os.path.join(sysconfig.get_path("stdlib"), ""))


def resolve_files(
    source: str | list[str],
    format: str | None = None,
    size_elsewhere: Callable[[str], int | None] = lambda name: None,
    include: Sequence[str] = (),
) -> list[SourceFile]:
    """The files of a source in their order.

    source: `python-stdlib`, or a path, directory (all its files, hidden ones and markers like _SUCCESS aside), glob
    (`**` allowed) or fsspec URL, or a list of those, kept in the list's order. format: one of FORMATS for every
    file, or None to infer it from each file's suffix. include: patterns, of which the name of a file in a directory
    must fit one. size_elsewhere: the size in bytes (-1: not known) of a file of some name (as in SourceFile) in another
    place, or None; asked for a file that the source names outright and that is not there. What a directory or pattern
    holds is never told by another place: it may hold more, or less.

    Raises DataError when nothing is found, a file is empty or there by two names, or its format is unknown.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"data.format: {format!r} is unknown; use one of {', '.join(FORMATS)}")
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("data.source: the list is empty; name at least one path, glob or URL")
    files: list[SourceFile] = []
    for position, one in enumerate(sources):
        # With several sources the place in the list leads the name: it keeps names unique and the user's
        # order.
        prefix = f"{position:04d}/" if len(sources) > 1 else ""
        try:
            found = _included(one, sorted(_find(one, format)), include)
        except SecretMissing:
            raise
        except DataError:
            found = _named_outright(one, prefix, format, size_elsewhere)
            if not found:
                raise
        files += _source_files(prefix, found, format)
        _refuse_strays(one, files[-len(found) :])
    _refuse_twice(files)
    return files


def _included(source: str, found: list[tuple[str, str, int]], include: Sequence[str]) -> list[tuple[str, str, int]]:
    """Those of a directory that are asked for, by their names in it; of what is named outright, all."""
    if not include or len(found) == 1 or glob.has_magic(source):
        return found
    kept = [one for one in found if any(fnmatch.fnmatchcase(one[0], pattern) for pattern in include)]
    if not kept:
        names = _listed([name for name, *_ in found])
        raise DataError(f"data.include: no file of {source} fits {', '.join(include)}; it holds {names}")
    return kept


def _refuse_twice(files: Sequence[SourceFile]) -> None:
    """A file that is there by two names would be used twice an epoch. The storage says what is one file."""
    known: dict[object, SourceFile] = {}
    for file in files:
        identity: object = file.url
        # The standard library is what its names are: a distribution may have linked files of the same content.
        if "://" not in file.url and not file.is_standard_library:
            with suppress(OSError):
                status = os.stat(file.url)
                identity = (status.st_dev, status.st_ino)
        other = known.setdefault(identity, file)
        if other is not file:
            names = "is listed twice" if other.url == file.url else f"and {other.url} are one file by two names"
            raise DataError(
                f"data.source: {file.url} {names}, so its samples would be used twice an epoch; "
                "remove one of the overlapping entries, or of the links"
            )


def _refuse_strays(source: str, files: Sequence[SourceFile]) -> None:
    """What a directory of records says about itself (README.md, LICENSE) is no data of it, whatever data.format is."""
    about = [file for file in files if _ABOUT.match(file.name.rpartition("/")[2])]
    strays = [file.name for file in about if _SUFFIXES.get(_suffix(_unpacked(file.name)), "text") == "text"]
    if strays and any(file.format != "text" for file in files if file.name not in strays):
        raise DataError(
            f"data.source: {source} holds {_listed(strays)} beside files of records; leave the text out with a pattern "
            "like DIR/**/*.jsonl, or name it as an entry of its own"
        )


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
    name = _without_query(source.rsplit("/", 1)[-1], source)
    if glob.has_magic(source) or (format is None and _suffix(_unpacked(name)) not in _SUFFIXES):
        return []
    size_bytes = size_elsewhere(prefix + name)
    url = source if "://" in source else os.path.abspath(os.path.expanduser(source))
    return [] if size_bytes is None else [(name, url, size_bytes)]


def _find_local(source: str) -> list[tuple[str, str, int]]:
    if os.path.isfile(source):
        paths, root = [source], os.path.dirname(source)
    elif os.path.isdir(source):
        paths, root = list(_walk(source, _is_aside)), source
        if os.path.isfile(os.path.join(source, _SPLITS)):
            arrows = [os.path.relpath(path, source) for path in paths if path.endswith(".arrow")]
            splits = sorted({path.split(os.sep)[0] for path in arrows})
            raise DataError(
                f"data.source: {source} holds several splits of a dataset ({', '.join(splits)}); name one of them: "
                f"{os.path.join(source, splits[0] if splits else 'train')}"
            )
        if any(path.endswith(".arrow") for path in paths):
            paths = [path for path in paths if os.path.basename(path) not in _OF_DATASETS]
    else:
        root, pattern = _split_pattern(source, os.path.isdir)
        found = glob.glob(os.path.join(glob.escape(root), pattern), recursive=True)
        paths = [path for path in found if os.path.isfile(path) and not _MARKERS.fullmatch(os.path.basename(path))]
    return [_local(path, root) for path in paths]


def _is_aside(name: str) -> bool:
    """Whether what has this name in a directory is no data of it: hidden, or a marker."""
    return name.startswith(".") or _MARKERS.fullmatch(name) is not None


def _split_pattern(source: str, is_directory: Callable[[str], bool]) -> tuple[str, str]:
    """The directory above the first part of a pattern that holds a wildcard, and the rest. A directory that is there
    under its very name, with brackets in it, is no wildcard."""
    parts = source.split("/")
    first = 0
    while first < len(parts) - 1 and (
        not glob.has_magic(parts[first]) or is_directory("/".join(parts[: first + 1]) or "/")
    ):
        first += 1
    return "/".join(parts[:first]) or ("/" if source.startswith("/") else ""), "/".join(parts[first:])


def _local(path: str, root: str) -> tuple[str, str, int]:
    name = os.path.relpath(path, root or ".").replace(os.sep, "/")
    try:
        return name, os.path.abspath(path), os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _walk(root: str, skipped: Any) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error}") from error

    above: dict[str, tuple[tuple[int, int], ...]] = {}
    for directory, directories, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(directory)
        line = (*above.get(os.path.dirname(directory), ()), (status.st_dev, status.st_ino))
        if line[-1] in line[:-1]:
            raise DataError(f"{directory}: a link to a directory that it is in, so there is no end of files; remove it")
        above[directory] = line
        directories[:] = [name for name in directories if not skipped(name)]
        yield from (os.path.join(directory, name) for name in names if not skipped(name))


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
    try:
        filesystem, path = filesystem_of(url)  # Some connect at once (ftp, sftp).
        found, root = _list_remote(filesystem, path, is_web=url.startswith(("http://", "https://")))
    except DataError:
        raise
    except Exception as error:  # every storage library has its own errors: name the URL in each
        # Over the web, whatever went wrong comes as a file that is not there.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, FileNotFoundError):
            return []
        raise DataError(f"data.source: {url} cannot be listed: {type(cause).__name__}: {cause}") from error
    files = [(p, info) for p, info in found.items() if info.get("type") != "directory"]
    prefix = root.rstrip("/") + "/" if root else ""
    named = [(p.removeprefix(prefix), p, info.get("size")) for p, info in files]
    if len(named) != 1 or named[0][1] != path:  # a file that is named outright is meant, whatever its name
        named = [one for one in named if "/." in path or not any(map(_is_aside, one[0].split("/")))]
    above = _what_its_paths_lack(filesystem, expand(url))
    return [
        (
            _without_query(name, url),
            above + p if above else filesystem.unstrip_protocol(p),
            -1 if size is None else int(size),
        )
        for name, p, size in named
    ]


def _what_its_paths_lack(filesystem: Any, url: str) -> str:
    """Of a file system whose paths do not say on which host they are (ftp, sftp, smb): `sftp://user:password@host`."""
    scheme, _, rest = url.partition("://")
    host = f"{scheme}://{rest.split('/', 1)[0]}"
    return {"/x": host, "x": f"{host}/"}.get(filesystem._strip_protocol(f"{host}/x"), "")


def _without_query(name: str, url: str) -> str:
    """A file's name is not who may read it, nor until when."""
    return name.partition("?")[0] or name if url.startswith(("http://", "https://")) else name


def _list_remote(filesystem: Any, path: str, *, is_web: bool) -> tuple[dict[str, Any], str]:
    """What a path or pattern stands for, by path, and the directory above it all. Raises what the storage raises."""
    if is_web and "*" in path:  # where ? belongs to the query, and brackets are no wildcards
        return filesystem.glob(path, detail=True), _split_pattern(path, lambda directory: False)[0]
    if not is_web and glob.has_magic(path) and not filesystem.exists(path):
        root, pattern = _split_pattern(path, filesystem.isdir)
        return filesystem.glob(f"{glob.escape(root).rstrip('/')}/{pattern}" if root else pattern, detail=True), root
    info = filesystem.info(path)
    if info["type"] == "directory":
        return filesystem.find(path, detail=True), path
    return {path: info}, path.rsplit("/", 1)[0] if "/" in path else ""


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises DataError when its driver is not installed, and for a
    secret in the URL that is not to be had."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(expand(url))
    except UrlProblem as error:
        raise SecretMissing(f"data.source: {error}") from None
    except (ImportError, ValueError) as error:  # the driver for s3://, gs:// ... is a package of its own
        raise DataError(f"data.source: {url} cannot be opened: {error}") from error
    return filesystem, path


def _source_files(prefix: str, found: Sequence[tuple[str, str, int]], format: str | None) -> list[SourceFile]:
    """Raises DataError with everything that is wrong with any of them."""
    files, unknown, packed, empty = [], [], [], []
    for name, url, size_bytes in found:
        is_packed = _suffix(name) in _PACKED
        inferred = None if is_packed else format or _SUFFIXES.get(_suffix(_unpacked(name)))
        if is_packed:
            packed.append(url)
        elif inferred is None:
            unknown.append(url)
        elif size_bytes == 0:
            empty.append(url)
        else:
            files.append(SourceFile(prefix + name, url, size_bytes, inferred))
    problems = []
    for suffix in dict.fromkeys(_suffix(_unpacked(url)) for url in unknown):
        several = [url for url in unknown if _suffix(_unpacked(url)) == suffix]
        problems.append(f"{_listed(several)}: cannot tell a format from the suffix {suffix!r}; {_OTHERWISE}")
    if packed:
        problems.append(
            f"{_listed(packed)}: not read, whatever data.format says: of compressed files only "
            f"{', '.join(COMPRESSIONS)} are; unpack them"
        )
    if empty:
        problems.append(f"{_listed(empty)}: the file is empty; remove it from data.source")
    if problems:
        raise DataError("\n".join(problems))
    return files


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _unpacked(name: str) -> str:
    """The name less the suffix of a compression."""
    return os.path.splitext(name)[0] if _suffix(name) in COMPRESSIONS else name


def _listed(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more
