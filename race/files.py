"""Files and folders that are written atomically: after a kill you find the complete old one or the complete new one."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import pickle
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from race import RaceError

DAY = 86400.0  # seconds; on a file system without locks, an unfinished folder of that age belongs to nobody
UNFINISHED = ".tmp"  # ".NAME.….tmp" is work that has not been finished


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, flush and rename it; if anything fails, the old file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.name[:100], older_than=3600.0)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; the old file is unchanged", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON atomically: tables as lists of records, numbers that JSON does not know as null."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))


def _plain(value: object) -> object:
    if hasattr(value, "to_dict"):  # a table
        value = value.astype(object).where(value.notna(), None).to_dict("records")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush(path: str | Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk; not where the file system does not offer that."""
    not_offered = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]  # docs/resuming.md says what is lost then
    not_offered += [errno.EPERM, errno.EACCES] if os.path.isdir(path) else []
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in not_offered:
            raise


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A locked folder beside `out`, in which to make it; removed at the end. First clears away what kills have left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(out.parent, out.name)
    with contextlib.ExitStack() as stack:
        while True:
            temporary = Path(tempfile.mkdtemp(UNFINISHED, f".{out.name}.", out.parent))
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another process took it for a dead one's
                stack.enter_context(locked(temporary / "lock"))
                break
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


def move_into_place(folder: Path, out: Path, known: Iterable[str] = ()) -> None:
    """Flush a finished folder to disk and rename it to `out`; what is there moves away first, and back on an error.

    Raises RaceError if a file is there whose name neither the new folder has nor `known`.
    """
    if others := sorted(below(out) - below(folder) - {*known}):
        raise RaceError(f"{out} holds files that were not made with it: {', '.join(others[:5])}; move them away")
    for path in (*folder.rglob("*"), folder):
        flush(path)
    old = folder.parent / "replaced"
    try:
        if out.exists():
            os.replace(out, old)
        os.replace(folder, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    flush(out.parent)


def below(folder: Path) -> set[str]:
    """All files below a folder, by their paths in it; a link counts as a file."""
    return {it.relative_to(folder).as_posix() for it in folder.rglob("*") if it.is_symlink() or not it.is_dir()}


def remove_unfinished(folder: Path, name: str = "", older_than: float = 0.0) -> None:
    """Remove temporary files older than `older_than` seconds, and temporary folders that no living process holds.

    name: of the finished one, or how it begins if it ends with "-"; "": any. A folder that was moved away comes back.
    """
    rest = ".????????" if name.rstrip("-") == name != "" else "*"  # with other characters, it is of a longer name
    for left in folder.glob(f".{glob.escape(name)}{rest}{UNFINISHED}"):
        with contextlib.suppress(OSError):  # held by another process, gone, or of a folder that is read only
            age = time.time() - left.stat().st_mtime
            if left.is_dir():
                _remove_folder(left, age)
            elif age >= older_than:
                left.unlink()


def _remove_folder(left: Path, age: float) -> None:
    with locked(left / "lock") as certain:
        if not certain and age < DAY:
            return
        out = left.parent / left.name[1 : -len(UNFINISHED)].rpartition(".")[0]
        if (left / "replaced").exists() and not out.exists():
            os.replace(left / "replaced", out)
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(left, ignore_errors=True)  # a network file system keeps a file that is open


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with the process; if another one holds it, wait, or raise BlockingIOError.

    Gives False on a file system without locks. A POSIX record lock: loader workers of a killed process do not hold it.
    """
    with open(path, "w") as file:
        certain = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, "held by another process", str(path)) from error
            certain = False
        yield certain


def file_hash(path: str | Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_identity(path: str | Path) -> tuple:
    """What changes when a file is written again: to remember what is known of this version."""
    status = os.stat(path)
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def known_hash(identity: tuple) -> str:
    """`file_hash` of a file by its `file_identity`; it is read once a process, and again if it has been written."""
    return file_hash(identity[0])


def save_archive(content: dict, path: str | Path) -> None:
    """torch.save, written atomically; raises OSError if the disk is full."""
    import torch

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a path would get into the file's content, which is to be the same again
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch hides what write() raised
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    atomic_write(path, write)


class Nothing(dict):
    """Stands for an object of another library in a checkpoint: takes everything, does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    __setstate__, __hash__ = __init__, object.__hash__


def read_archive(path: str | Path, mmap: bool = False, inert: tuple[str, ...] = ()) -> dict:
    """Tensors (on the CPU) and plain values of a file that torch.save wrote; code in it is never run.

    inert: libraries whose objects are read as Nothing. Raises RaceError if it is missing, damaged, or holds more.
    """
    import torch

    try:
        with open(path, "rb") as file:
            old = file.read(2) == b"\x80\x02"  # torch before 1.6 wrote no archive, and no checksums
        if not old:
            _check_archive(file_identity(path))
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if inert and not old else []
        stubs = [(type(name, (Nothing,), {}), name) for name in others if name.split(".")[0] in inert]
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and not old)
        if isinstance(content, dict):
            return content
        problem = f"holds a {type(content).__name__}, not a checkpoint"
    except FileNotFoundError as error:
        raise RaceError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise RaceError(f"{path}: could run code (more than weights and plain values); save a state dict") from error
    except Exception as error:  # damaged files make the libraries raise anything
        problem = f"no file of torch.save, or cut off or damaged ({f'{error}'.partition(chr(10))[0]:.200})"
    raise RaceError(f"{path}: {problem}; name another file (of a *.safetensors, its folder), or fetch a good copy")


@functools.lru_cache(maxsize=256)
def _check_archive(identity: tuple) -> None:
    """Raise BadZipFile if a zip archive is damaged, by its own checksums; once for each version of a file."""
    with zipfile.ZipFile(identity[0]) as archive:
        if any(entry.compress_type or entry.external_attr for entry in archive.infolist()):  # torch writes zeros
            raise zipfile.BadZipFile("an entry is not as torch.save writes it")
        if bad := archive.testzip():
            raise zipfile.BadZipFile(bad)
