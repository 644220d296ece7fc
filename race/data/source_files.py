"""The files of a source: which lie in a folder or an archive, and which of them are questions of which split."""

import lzma
import os
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from race import LEVELS, SPLITS, RaceError

SPLIT_OF = {split: split for split in SPLITS} | {"dev": "validation", "val": "validation"}
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
NAMING = "name folders or files train, dev (or validation, val) and test: test.csv, test/questions.json"
Content = bytes | Path | RaceError  # of a file; a Path is read in its turn


def _is_hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))


def _is_data(name: str) -> bool:
    """Hidden files and folders, and what macOS adds to archives, are never data."""
    return name.lower().endswith(SUFFIXES) and not any(map(_is_hidden, name.split("/")))


def _natural(file: tuple[str, Any]) -> list:
    """Sort key that puts 9.txt before 10.txt."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file[0])]


def _marks(name: str) -> tuple[str, str | None, str]:
    """What a path names: the data set (all that stands before the split), the split and the level."""
    *folders, file = name.split("/")
    at = next((i for i, folder in enumerate(folders) if folder.lower() in SPLIT_OF), None)
    if at is not None:
        split, level = SPLIT_OF[folders[at].lower()], "".join(folders[at + 1 : at + 2])
    else:
        at, level = len(folders), "".join(folders[-1:])
        words = re.findall(r"[^\W\d_]+", file.rpartition(".")[0].lower())
        named = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
        split = named.pop() if len(named) == 1 else None
    return "/".join(folders[:at]), split, level.lower() if level.lower() in LEVELS else ""


def chosen(files: list[tuple[str, Content]], answers: bool) -> tuple[list[tuple[str, str, str, Content]], list[str]]:
    """(split, level, name, content) of the files of one data set, and a line about each group left out."""
    if not files:
        raise RaceError(f"no questions found: it holds no file of a known kind ({', '.join(SUFFIXES)})")
    texts = [name.encode("utf-8", "backslashreplace").decode() for name, _ in files]  # other bytes become \udcXX
    marked = [(*_marks(name), name, content) for name, (_, content) in zip(texts, files, strict=True)]
    named = [file for file in marked if file[1]]
    if not named and answers:
        raise RaceError(f"no questions found: no folder or file is named after a split; {NAMING}")
    if not named:  # questions that somebody wants answered: of no split
        return [("test", *file[2:]) for file in marked], []
    notes, data_sets = [], sorted({data_set for data_set, *_ in named})
    if len(data_sets) > 1:
        whole = [data_set for data_set in data_sets if data_set.rpartition("/")[2] == "all"]
        listed = ", ".join(data_set or "the top folder" for data_set in data_sets)
        if len(whole) != 1:
            raise RaceError(f"several data sets lie side by side ({listed}): name the folder of one as --source")
        notes.append(f"several data sets lie side by side ({listed}): only {whole[0]} is read")
        named = [file for file in named if file[0] == whole[0]]
    if others := [name for _, split, _, name, _ in marked if not split]:
        listed = ", ".join([*others[:3], *["…"][: len(others) - 3]])
        notes.append(f"{len(others)} file(s) named after no split are left out: {listed}")
    return [file[1:] for file in named], notes


def folder_files(folder: Path) -> list[tuple[str, Content]]:
    found: list[tuple[str, Content]] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        place = Path(error.filename).relative_to(folder).as_posix()
        if _marks(f"{place}/")[1]:
            found.append((f"{place}/", RaceError(f"cannot be read ({error.strerror})")))

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        identity = os.stat(place).st_dev, os.stat(place).st_ino
        folders[:] = [name for name in folders if not _is_hidden(name) and identity not in seen]
        if identity in seen:  # a link to a parent folder
            continue
        seen.add(identity)
        names = (Path(place, name).relative_to(folder).as_posix() for name in [*files, *folders])
        found += [(name, folder / name) for name in names if _is_data(name)]
    return sorted(found, key=_natural)


class _StrictTar(tarfile.TarInfo):
    """A damaged or missing header is an error; tarfile would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError("damaged or cut off") from error


def archive_files(path: Path) -> list[tuple[str, Content]]:
    """Members are read in memory, never unpacked: a path in them cannot lead out of a folder."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK" or path.suffix.lower() == ".zip"
        return sorted(_zip_files(path) if is_zip else _tar_files(path), key=_natural)
    except PermissionError as error:
        raise RaceError(f"cannot be read ({error.strerror})") from error
    except (RuntimeError, NotImplementedError) as error:
        raise RaceError(
            "a zip file with a password or an unknown compression: unpack it, and name the folder"
        ) from error
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, OSError, EOFError, ValueError) as error:
        raise RaceError("not a tar or zip file that can be read, or damaged or cut off: fetch it again") from error


def _tar_files(path: Path) -> list[tuple[str, Content]]:
    files: list[tuple[str, Content]] = []
    with tarfile.open(path, tarinfo=_StrictTar) as tar:
        for member in tqdm(tar, desc=f"unpacking {path}", unit=" files", delay=2, leave=False):
            if member.isfile() and _is_data(member.name):
                files.append((member.name, tar.extractfile(member).read()))
            elif (member.islnk() or member.issym()) and _is_data(member.name):
                files.append((member.name, RaceError("a link inside an archive; pack the file itself")))
        while tar.fileobj.read(1 << 20):  # to the end, where a compressed archive has its checksum
            pass
    return files


def _zip_files(path: Path) -> list[tuple[str, Content]]:
    """Every member is read, whatever its name: zipfile compares names and checksums only then."""
    with zipfile.ZipFile(path) as archive:
        if any(b"PK\1\2" in member.comment + member.extra for member in archive.infolist()):
            raise zipfile.BadZipFile("a damaged length took in the entries that follow it")
        members = tqdm(archive.infolist(), desc=f"unpacking {path}", unit=" files", delay=2, leave=False)
        files = [(member.filename.replace("\\", "/"), archive.read(member)) for member in members]
    return [(name, content) for name, content in files if _is_data(name)]
