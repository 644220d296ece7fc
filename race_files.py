"""Files that are whole or absent, and that know when they were damaged: written aside, flushed, renamed, sealed."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import os
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

SEAL = b"race-sha256:"  # in the comment of a checkpoint's zip archive, followed by the hash of all before the comment
SEAL_LENGTH = len(SEAL) + 64
DAY = 86400.0  # seconds; without locks, an unfinished folder of that age is nobody's
MARK = ".tmp"  # a name ".….tmp" is unfinished work


class DamagedFileError(ValueError):
    """A file that is not what was written; the message names it and what to do."""


# -------------------------------------------------------------------------------------------------- writing


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk and rename it: `path` is the old file or the new one.

    Whatever fails (a full disk, a kill) leaves the old file; the unfinished one is removed now or by `clean`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent, path.name, older_than=3600.0)
    descriptor, name = tempfile.mkstemp(MARK, f".{path.name[:100]}.", path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner only
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; the file before it is untouched", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: str | Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A locked temporary folder beside `out`, removed at the end; first clears away what killed processes left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    clean(out.parent, out.name)
    with contextlib.ExitStack() as stack:
        while True:
            temporary = Path(tempfile.mkdtemp(MARK, f".{out.name}.", out.parent))
            with contextlib.suppress(
                BlockingIOError, FileNotFoundError
            ):  # another process just took it for a dead one's
                stack.enter_context(locked(temporary / "lock"))
                break
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


def move_in(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`; what is there moves beside `folder` first, and back should that fail."""
    aside = folder.parent / "replaced"
    try:
        if out.exists():
            os.replace(out, aside)
        os.replace(folder, out)
    except BaseException:
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        raise
    flush(out.parent)


def clean(folder: Path, name: str = "", older_than: float = 0.0) -> None:
    """Remove unfinished files of some age (seconds), and unfinished folders that no living process holds.

    name: how that begins which they were to become. A folder that was moved away to make room for a new one, which then
    never came, is put back.
    """
    for left in folder.glob(f".{glob_escape(name)}*{MARK}"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            age = time.time() - left.stat().st_mtime
            if left.is_file():
                if age >= older_than:
                    left.unlink()
                continue
            with locked(left / "lock") as surely:
                if not surely and age < DAY:
                    continue
                out = folder / left.name[1 : -len(MARK)].rpartition(".")[0]
                if (left / "replaced").exists() and not out.exists():
                    os.replace(left / "replaced", out)
                shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(left, ignore_errors=True)  # a network file system keeps a file that is open


def glob_escape(name: str) -> str:
    """`name` as a pattern that matches itself only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process; raises BlockingIOError where another process holds it.

    POSIX's record lock, which loader workers do not inherit: they outlive a killed process for seconds. Gives False
    where the file system has no locks (some network ones).
    """
    with open(path, "w") as file:
        surely = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, "held by another process", str(path)) from error
            surely = False
        yield surely


# -------------------------------------------------------------------------------------------------- integrity


def file_hash(path: str | Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_identity(path: str | Path) -> tuple:
    """What changes when a file is written anew: for remembering that it was checked."""
    status = os.stat(path)
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


class _Sealing(io.RawIOBase):
    """Hashes what passes through, and holds back the last two bytes: the length of a zip archive's comment."""

    def __init__(self, file):
        self.file, self.digest, self.held = file, hashlib.sha256(), b""
        self.error: OSError | None = None  # which torch.save would hide behind a RuntimeError

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        content = self.held + bytes(data)
        self.held = content[-2:]
        self.digest.update(content[:-2])
        try:
            self.file.write(content[:-2])
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def seal(self) -> None:
        assert self.held == b"\0\0", "torch.save writes zip archives without a comment"
        self.file.write(struct.pack("<H", SEAL_LENGTH) + SEAL + self.digest.hexdigest().encode())


def save_sealed(content: dict, path: str | Path) -> None:
    """torch.save, whole or not at all, with a hash of everything in the archive's comment."""
    import torch

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            sealing = _Sealing(file)
            try:
                torch.save(content, sealing)
            except RuntimeError:
                if sealing.error is None:
                    raise
                raise sealing.error from None
            sealing.seal()

    write_whole(path, write)


def check_sealed(path: str | Path) -> None:
    """Raise DamagedFileError where a checkpoint is not what was written, FileNotFoundError where there is none.

    A checkpoint from elsewhere has no seal; it has to be a whole zip archive whose checksums agree.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if problem := _problem(file_identity(path)):
        raise DamagedFileError(f"{path}: {problem}; remove it, or put a good copy in its place")


@functools.lru_cache(maxsize=256)
def _problem(identity: tuple) -> str | None:
    path = identity[0]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - SEAL_LENGTH - 2))
        tail = file.read()
        if tail[:-64] == struct.pack("<H", SEAL_LENGTH) + SEAL:
            file.seek(0)
            digest, left = hashlib.sha256(), size - SEAL_LENGTH - 2
            while left:
                block = file.read(min(left, 1 << 20))
                digest.update(block)
                left -= len(block)
            return None if digest.hexdigest().encode() == tail[-64:] else "damaged, it differs from what was written"
    return _foreign_problem(path) if tail.endswith(b"\0\0") else "cut off or damaged, its end is missing"


def _foreign_problem(path: str) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:
                return "damaged, its seal is not readable"
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        return f"not a whole checkpoint ({error})"
    return f"damaged at {bad}" if bad else None
