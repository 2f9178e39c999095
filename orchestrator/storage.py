"""Where checkpoints are kept: a directory on any file system, or anything fsspec has a name for.

The little that is asked of a storage, so that any kind can do it: files that are written once and whole, read in
ranges, listed and removed. Nothing relies on renaming, on appending, or on one file appearing before another except
through `put`, which returns when its file is durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from monitoring.redaction import redact
from orchestrator.urls import expand

T = TypeVar("T")

Pieces = Callable[[], Iterable[memoryview | bytes]]
"""The contents of a file, in order; asked for again when writing is tried again."""

PLUGINS = "storages"
"""Other packages' storages, by the protocol of their URLs."""


class StorageError(OSError):
    """A storage that did not do what it was asked; says which, where and why. `transient` says that it may later."""

    def __init__(self, text: str, *, transient: bool = False) -> None:
        super().__init__(redact(text))
        self.transient = transient


class NotAFile(StorageError):
    """What is at a path is not what a checkpoint has there: a directory, a pipe, a link, a file far too large."""


class Storage(ABC):
    """Files by their path below one place, with "/" between names.

    All methods raise FileNotFoundError for a file that is not there (but removing is then done already), NotAFile where
    something else is in its place, and otherwise OSError when the storage fails.
    """

    is_remote = False
    """Whether what one process of a node has read is no nearer to the next one: there is no page cache before it."""

    @abstractmethod
    def locate(self, path: str) -> str:
        """What a user calls this path."""

    @abstractmethod
    def put(self, path: str, pieces: Pieces) -> None:
        """Writes a new file; when this returns it is whole and durable, and when it raises there is none.

        Raises FileExistsError rather than touch a file that is there.
        """

    @abstractmethod
    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes of a file from `start` on. Raises EOFError when the file is too short."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def names(self, path: str) -> list[str]:
        """The names of files and directories directly below `path`, in order; none when it is not there."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Takes a file away, durably."""

    @abstractmethod
    def remove_directory(self, path: str) -> None:
        """Takes away what is left of a directory whose files were removed."""

    def read(self, path: str, max_bytes: int = 64 << 20) -> bytes:
        """A whole (small) file. Raises NotAFile for one of more than `max_bytes`, before memory is taken for it."""
        size = self.size(path)
        if size > max_bytes:
            raise NotAFile(f"{self.locate(path)} has {size} bytes, more than such a file may have ({max_bytes})")
        buffer = bytearray(size)
        self.read_into(path, 0, memoryview(buffer))
        return bytes(buffer)


def open_storage(url: str) -> Storage:
    """The storage at a path or fsspec URL. Raises ValueError for a URL that cannot be used here, saying why."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        return Patient(LocalStorage(Path(url).resolve()))
    if protocol in ("file", "local"):
        return Patient(LocalStorage(Path(rest).resolve()))
    if (reason := why_not(url)) is not None:
        raise ValueError(reason)
    if (maker := _of_package(protocol)) is not None:
        given = expand(url)
        try:
            made = maker(given)
        except Exception as error:  # A package of somebody else's can fail with anything.
            raise StorageError(f"{url} cannot be opened: {type(error).__name__}: {error}", transient=True) from error
        # By what it can do, as `doctor` sends this module to nodes, where it is not the one that the package knows.
        if not all(hasattr(made, name) for name in Storage.__abstractmethods__):
            raise ValueError(f"the package for {protocol}:// gives a {type(made).__name__}, not a Storage")
        return Patient(made)
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(expand(url))
    except (OSError, ValueError):
        raise
    except Exception as error:  # of those that connect at once, like ftp, each in words of its own
        raise StorageError(f"{url} cannot be opened: {type(error).__name__}: {error}", transient=True) from error
    return Patient(ObjectStorage(filesystem, root, url))


def why_not(url: str) -> str | None:
    """Why a storage URL cannot be used on this machine; None when it can."""
    protocol, separator, rest = url.partition("://")
    if not separator or protocol in ("file", "local"):
        return None
    if not rest.strip("/"):
        return f"{url!r} names no bucket or directory"
    try:
        if _of_package(protocol) is not None:
            return None
    except ValueError as error:
        return str(error)
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        return f"{protocol}:// needs a package that is not installed: {error}"
    except ValueError:
        known = ", ".join(sorted(name for name in fsspec.available_protocols() if name in _COMMON))
        return f"{protocol}:// is no storage that fsspec knows; for example {known}"
    return None


def _of_package(protocol: str) -> Callable[[str], Any] | None:
    """What another package has for this protocol, to be called with the URL; None when there is none.

    Raises ValueError when that package fails.
    """
    try:
        from orchestrator import plugins
    except ImportError:  # `doctor` sends this module to nodes, which need not have the rest of this package
        return None
    if protocol not in plugins.names(PLUGINS, ()):
        return None
    found: Callable[[str], Any] = plugins.find_callable(PLUGINS, protocol, {})
    return found


_COMMON = {"s3", "gs", "abfs", "az", "hdfs", "sftp", "http", "memory", "file"}


# ---------------------------------------------------------------------------------------- file systems


class LocalStorage(Storage):
    """A directory that the operating system knows, local or shared. A file is durable when it and the names that lead
    to it have been synced (fsync).

    A root that was there once is not made again: it was deleted, or its file system is no longer mounted, and nobody
    would look for what is written in its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._was_there = root.is_dir()

    def locate(self, path: str) -> str:
        return str(self.root / path) if path else str(self.root)

    def put(self, path: str, pieces: Pieces) -> None:
        target = self.root / path
        self._make_directory(target.parent)
        self._was_there = True  # Another rank may have made it.
        file = self._create(target)
        try:
            try:
                for piece in pieces():
                    self._write(file, memoryview(piece).cast("B"))
                self._sync(file)
            finally:
                os.close(file)
            self._sync_directory(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target)
            raise

    def _make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        if path == self.root and self._was_there:
            raise StorageError(f"{path} was there and is gone: deleted, moved or no longer mounted", transient=True)
        self._make_directory(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        self._sync_directory(path.parent)

    # What tests count, and let fail.

    def _create(self, target: Path) -> int:
        return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _write(self, file: int, data: memoryview) -> None:
        while data:
            data = data[os.write(file, data) :]

    def _sync(self, file: int) -> None:
        os.fsync(file)

    def _sync_directory(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as error:
            # Some shared file systems have nothing to sync in a directory, and say so.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(file)

    def _unlink(self, target: Path) -> None:
        os.unlink(target)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        file = self._open(path)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(file, [buffer[done:]], start + done)
                if count == 0:
                    raise EOFError(f"{self.locate(path)} ends at byte {start + done}")
                done += count
        finally:
            os.close(file)

    def _open(self, path: str) -> int:
        """Opens a file for reading; follows no link and waits for no pipe."""
        try:
            file = os.open(self.root / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise NotAFile(f"{self.locate(path)} is not a regular file") from error
            raise
        try:
            self._regular(path, os.fstat(file))
        except BaseException:
            os.close(file)
            raise
        return file

    def _regular(self, path: str, found: os.stat_result) -> os.stat_result:
        if not stat.S_ISREG(found.st_mode):
            raise NotAFile(f"{self.locate(path)} is not a regular file")
        return found

    def size(self, path: str) -> int:
        return self._regular(path, os.lstat(self.root / path)).st_size

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        target = self.root / path
        # What is a directory is nothing of ours, and stays.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            self._unlink(target)
            self._sync_directory(target.parent)

    def remove_directory(self, path: str) -> None:
        # One that another rank is putting a file into is not empty, and stays.
        with contextlib.suppress(FileNotFoundError):
            try:
                os.rmdir(self.root / path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


# ---------------------------------------------------------------------------------------- object stores


class ObjectStorage(Storage):
    """A place in a file system of fsspec (s3, gs, abfs, memory, ...), where an object is there when it is whole."""

    is_remote = True

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        """root: the place as the file system names it; url: as the user does."""
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.url = url.rstrip("/")

    def locate(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def put(self, path: str, pieces: Pieces) -> None:
        target = self._at(path)
        with self._explained(path):
            if self.filesystem.exists(target):
                raise FileExistsError(errno.EEXIST, "there is a file already", self.locate(path))
            self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            file = self.filesystem.open(target, "wb")
            try:
                for piece in pieces():
                    file.write(piece)
            except BaseException:
                self._discard(file, target)
                raise
            file.close()

    def _discard(self, file: Any, target: str) -> None:
        """An upload that is given up leaves nothing behind, as far as the store lets us see to it."""
        with contextlib.suppress(Exception):
            if hasattr(file, "discard"):
                file.discard()
            else:
                file.closed = True
        with contextlib.suppress(Exception):
            if self.filesystem.exists(target):
                self.filesystem.rm_file(target)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        with self._explained(path):
            found = self.filesystem.cat_file(self._at(path), start=start, end=start + len(buffer))
        if len(found) < len(buffer):
            raise EOFError(f"{self.locate(path)} ends at byte {start + len(found)}")
        buffer[:] = found

    def size(self, path: str) -> int:
        with self._explained(path):
            # Another process may have written it since it was last looked for.
            self.filesystem.invalidate_cache(self._at(path).rpartition("/")[0])
            return int(self.filesystem.info(self._at(path))["size"])

    def names(self, path: str) -> list[str]:
        with self._explained(path):
            self.filesystem.invalidate_cache(self._at(path))
            try:
                entries = self.filesystem.ls(self._at(path), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted({str(entry).rstrip("/").rpartition("/")[2] for entry in entries} - {""})

    def remove(self, path: str) -> None:
        with self._explained(path), contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._at(path))

    def remove_directory(self, path: str) -> None:
        # Where directories are only a way of writing names, there is nothing to remove.
        with contextlib.suppress(Exception):
            self.filesystem.rmdir(self._at(path))

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Client libraries raise what they like; here it becomes an OSError, which another try may mend."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            text = f"{self.locate(path)}: {type(error).__name__}: {error}"
            raise StorageError(text, transient=_may_pass(error)) from error


def _may_pass(error: Exception) -> bool:
    """Whether a client library's error is of the kind that passes: not one about who we are or what we may do."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", status)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 425, 429))


# ---------------------------------------------------------------------------------------- trying again


_LASTING = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG, errno.EFBIG, errno.ENOTEMPTY, errno.ELOOP, errno.EINVAL,
}  # fmt: skip
"""Errors that another try a moment later would only repeat."""


class Patient(Storage):
    """A storage that is asked again when it fails for the moment: `tries` times in all, after pauses that double from
    `pause_s` on, up to `longest_pause_s`, each of a random length around that, so that many ranks do not come back
    at once."""

    def __init__(self, inner: Storage, tries: int = 5, pause_s: float = 0.2, longest_pause_s: float = 10.0) -> None:
        self.inner = inner
        self.is_remote = inner.is_remote
        self._tries = tries
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s

    def _try(self, operation: Callable[[], T]) -> T:
        for number in range(1, self._tries + 1):
            try:
                return operation()
            except OSError as error:
                if number == self._tries or not is_transient(error):
                    raise
            pause_s = min(self._longest_pause_s, self._pause_s * 2 ** (number - 1))
            time.sleep(pause_s * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def locate(self, path: str) -> str:
        return self.inner.locate(path)

    def put(self, path: str, pieces: Pieces) -> None:
        self._try(lambda: self.inner.put(path, pieces))

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        self._try(lambda: self.inner.read_into(path, start, buffer))

    def size(self, path: str) -> int:
        return self._try(lambda: self.inner.size(path))

    def names(self, path: str) -> list[str]:
        return self._try(lambda: self.inner.names(path))

    def remove(self, path: str) -> None:
        self._try(lambda: self.inner.remove(path))

    def remove_directory(self, path: str) -> None:
        self._try(lambda: self.inner.remove_directory(path))


def is_transient(error: OSError) -> bool:
    """Whether another try a moment later may end otherwise."""
    if isinstance(error, StorageError):
        return error.transient
    return not isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)) and error.errno not in _LASTING
