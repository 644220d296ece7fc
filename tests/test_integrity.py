"""Files are whole or refused by name; a full disk, a kill or a second process costs nothing; no file runs code."""

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from helpers import RECORD, ROOT, Payload
from kill import in_a_process
from small_stage import At, e1, interrupt, same_weights, stage, state

import generate_race_cache
import race.files
from race import RaceError
from race.data import RaceDataModule
from race.data.cache import Cache, build_cache, verify_cache, write_manifest
from race.files import atomic_write, file_hash, read_archive, save_archive, temporary_folder
from race.train.checkpoints import Checkpoint
from race.train.stages import Stage
from race.train.training import DISK_FULL, start_stage
from race_module import RaceModule


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A folder in which e1 has been trained for two short epochs."""
    folder = tmp_path_factory.mktemp("trained")
    stage(folder, cache)
    return folder


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One bit flipped, or the end cut off."""
    if rng.random() < 0.2:
        return content[: rng.randrange(len(content))]
    place = rng.randrange(len(content) - 400, len(content)) if rng.random() < 0.1 else rng.randrange(len(content))
    changed = bytearray(content)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_every_damaged_cache_file_is_refused_by_name(cache, tmp_path):
    """300 flips and truncations over all files that training opens."""
    folder, rng = tmp_path / "cache", random.Random(0)
    shutil.copytree(cache, folder)
    names = ["manifest.json", *Cache(folder).manifest["files"]]
    for _ in range(300):
        path = folder / rng.choice(names)
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        with pytest.raises(RaceError) as error:
            RaceDataModule(folder).setup()
            start_stage(Stage("e1"), folder)
        assert str(path) in str(error.value)
        path.write_bytes(content)
    RaceDataModule(folder).setup()


def test_a_file_is_read_once_and_again_when_it_has_been_written(cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "cache")
    opened = Cache(tmp_path / "cache")
    opened.check_files()
    with monkeypatch.context() as patched:
        patched.setattr(race.files, "file_hash", lambda path: pytest.fail(f"{path} is read again"))
        opened.check_files()
    path = tmp_path / "cache" / "test-questions.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RaceError, match=r"test-questions.arrow: damaged"):
        opened.check_files()


@pytest.mark.parametrize("kind", ["checkpoint", "state"])
def test_every_damaged_checkpoint_is_refused_by_name(trained, tmp_path, kind):
    """200 flips and truncations over a checkpoint or a state: refused by name, or read without any difference."""
    source = e1(trained).state_path if kind == "state" else e1(trained).best().path
    path, content, rng = tmp_path / source.name, source.read_bytes(), random.Random(1)
    weights, lineage = read_archive(source)["state_dict"], read_archive(source)["race"]
    for _ in range(200):
        path.write_bytes(damaged(content, rng))
        for read in (Checkpoint, RaceModule.load_from_checkpoint):
            race.files._check_archive.cache_clear()
            try:
                read(path)
            except RaceError as error:
                assert str(path) in str(error)
            else:  # a byte that no reader looks at: what is read is the same
                found = read_archive(path)
                assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in weights.items())
                assert found["race"] == lineage


def test_a_damaged_file_of_a_torch_before_1_6_is_refused_or_read(trained, tmp_path):
    """It has no checksums: a flipped weight is read, but nothing else is raised."""
    path, rng = tmp_path / "old.ckpt", random.Random(2)
    torch.save(read_archive(e1(trained).best().path), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for damage in range(200):
        at = rng.randrange(2, len(content) if damage % 2 else 5000)  # the structure comes first
        path.write_bytes(content[:at] + (b"" if damage % 2 else bytes([rng.randrange(256)]) + content[at + 1 :]))
        try:
            read_archive(path)
        except RaceError as error:
            assert str(path) in str(error)
        else:
            assert not damage % 2


def test_a_checkpoint_from_elsewhere_is_taken_if_it_is_whole(tmp_path):
    """By the checksums of the zip archive that torch.save writes."""
    path = tmp_path / "theirs.ckpt"
    torch.save({"state_dict": {"a": torch.arange(1000)}}, path)
    assert Checkpoint(path).lineage == {}
    content = path.read_bytes()
    attributes = content.rindex(b"PK\x01\x02") + 38  # torch would take the entry for a folder, and read no weights
    for place, bit in ((len(content) // 2, 1), (attributes, 16)):
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(RaceError, match=r"theirs.ckpt: .*damaged"):
            Checkpoint(path)
    path.write_text("hello")
    with pytest.raises(RaceError, match=r"theirs.ckpt: "):
        Checkpoint(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB; skips where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("no small file system can be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave: int = 0) -> None:
    """Leave no room but `leave` bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def test_a_file_that_may_not_grow(tmp_path):
    """As with a quota: for all users, also where no small file system can be mounted."""
    save_archive({"old": torch.zeros(10)}, tmp_path / "x.ckpt")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_archive({"new": torch.zeros(1_000_000)}, tmp_path / "x.ckpt")
        except OSError as error:
            os._exit(7 if error.errno in DISK_FULL and "unchanged" in str(error) else 8)

    process = in_a_process(limited)
    process.join(30)
    assert process.exitcode == 7 and [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    assert "old" in read_archive(tmp_path / "x.ckpt")


@pytest.mark.parametrize("force", [False, True])
def test_full_disk_while_making_a_cache(corpus, small_disk, capsys, force):
    out = small_disk / "cache"
    arguments = ["--source", str(corpus), "--model", "demo", "--out", str(out)]
    if force:
        assert generate_race_cache.main(arguments) == 0
        arguments += ["--force", "--max-qa-len", "9"]
    fill(small_disk, 300_000)
    assert generate_race_cache.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"error: {out}: " in said and "No space left on device" in said
    (small_disk / "filler").unlink()
    assert [path.name for path in small_disk.iterdir()] == (["cache"] if force else [])
    assert not force or (verify_cache(out) == [] and Cache(out).manifest["max_qa_len"] == 128)


@pytest.mark.parametrize(("step", "minutes"), [(5, 0.0), (7, 60.0)])
def test_full_disk_while_training(trained, cache, small_disk, step, minutes):
    """Saving a state, or an epoch: ended in words; with room again it goes on from the last good state, exactly."""
    with pytest.raises(RaceError, match="the disk is full.*make room"):
        stage(small_disk, cache, At(step, lambda *_: fill(small_disk, 4096)), minutes=minutes)
    kept = state(small_disk)["resume"]
    assert kept["epoch"] == 0 and kept["batches"] in ((4, 5) if minutes == 0 else (0, 7))
    assert not list((small_disk / "checkpoints").glob("*.ckpt"))
    (small_disk / "filler").unlink()
    stage(small_disk, cache)
    assert same_weights(small_disk, trained) and not list(small_disk.rglob(".*.tmp"))
    assert len(e1(small_disk).saved) == 2


def lacking(monkeypatch, call: str, error: int, what) -> list:
    """Make os.fsync or os.open fail for paths of which `what` is true; returns the list of those refused."""
    original, refused = getattr(os, call), []

    def fails(place, *rest, **others):
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
        if what(path):
            refused.append(path)
            raise OSError(error, os.strerror(error), path)
        return original(place, *rest, **others)

    monkeypatch.setattr(os, call, fails)
    return refused


@pytest.mark.parametrize(
    ("call", "error", "what"), [("fsync", errno.EINVAL, os.path.isdir), ("fsync", errno.ENOTSUP, os.path.exists)]
)
def test_file_systems_that_lack_a_call(corpus, tmp_path, monkeypatch, call, error, what):
    """A cache is made, a stage trains, stops and resumes."""
    refused = lacking(monkeypatch, call, error, what)
    cache = tmp_path / "cache"
    build_cache(str(corpus), "demo", cache)
    assert verify_cache(cache) == []
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, cache, At(3, interrupt), epochs=1)
    stage(tmp_path, cache, epochs=1)
    assert state(tmp_path)["resume"]["finished"] and refused
    assert not list(tmp_path.rglob(".*.tmp"))


def test_files_are_as_the_umask_says_and_a_folder_may_be_closed(tmp_path, monkeypatch):
    """Such as that of a share, which cannot be flushed."""
    lacking(monkeypatch, "open", errno.EACCES, os.path.isdir)
    atomic_write(tmp_path / "x", lambda path: path.write_text("new"))
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x").read_text() == "new" and (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_an_error(tmp_path, monkeypatch, error):
    atomic_write(tmp_path / "x", lambda path: path.write_text("old"))
    lacking(monkeypatch, "fsync", error, os.path.isfile)
    with pytest.raises(OSError, match="the old file is unchanged") as raised:
        atomic_write(tmp_path / "x", lambda path: path.write_text("new"))
    assert raised.value.errno == error and (tmp_path / "x").read_text() == "old"


MAKE = """
import os, signal, sys, time
import pyarrow, transformers
from race.data.cache import build_cache
source, out, length, death = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
replace, renames = os.replace, []
def second_time(*names):
    renames.append(names)
    if death == "between the renames" and len(renames) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = second_time
print("ready", flush=True)
build_cache(source, "demo", out, max_qa_len=length, force=length != 128 or death == "replaces")
"""


def maker(corpus, out, length: int = 128, death: str = "") -> subprocess.Popen:
    """A fresh process that makes a cache: threads of this one would not survive a fork."""
    command = [sys.executable, "-c", MAKE, str(corpus), str(out), str(length), death]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.fixture
def out(corpus, tmp_path):
    """A cache that is there already, alone in its folder."""
    build_cache(str(corpus), "demo", tmp_path / "out" / "cache")
    return tmp_path / "out" / "cache"


def alone_and_whole(out) -> bool:
    return verify_cache(out) == [] and [path.name for path in out.parent.iterdir()] == ["cache"]


def test_two_processes_make_the_same_cache_at_once(corpus, tmp_path):
    """One of them replaces what it finds."""
    makers = [maker(corpus, tmp_path / "out" / "cache", death=death) for death in ("", "replaces")]
    assert [process.wait(300) for process in makers] == [0, 0] and alone_and_whole(tmp_path / "out" / "cache")


def test_a_killed_maker_leaves_the_cache_before(corpus, out):
    """Killed at random moments while it replaces a cache: one whole cache is there after the next start."""
    rng = random.Random(0)
    for number in range(4):
        process = maker(corpus, out, 9)
        process.stdout.readline()  # it begins now
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        process.wait(10)
        assert not out.exists() or verify_cache(out) == []
        if number % 2:
            build_cache(str(corpus), "demo", out, force=True)
            assert alone_and_whole(out)


def test_a_cache_moved_away_for_a_new_one_comes_back(corpus, out):
    """Killed between the two renames: the old cache is put back on the next start."""
    assert maker(corpus, out, 9, "between the renames").wait(300) == -signal.SIGKILL and not out.exists()
    assert Cache(out).manifest["max_qa_len"] == 128 and alone_and_whole(out)  # also for who opens it
    assert maker(corpus, out, 9, "between the renames").wait(300) == -signal.SIGKILL and not out.exists()
    assert build_cache(str(corpus), "demo", out)["kept"] and alone_and_whole(out)


@pytest.mark.parametrize("error", [OSError("stale handle"), KeyboardInterrupt()])
def test_a_replacement_that_fails_puts_the_old_cache_back(corpus, out, monkeypatch, error):
    replace = os.replace

    def fails(source, target):
        if target == out and "replaced" not in str(source):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(type(error)):
        build_cache(str(corpus), "demo", out, max_qa_len=9, force=True)
    assert alone_and_whole(out) and Cache(out).manifest["max_qa_len"] == 128


def test_a_name_that_begins_like_another_file_s_leaves_its_temporary_file(tmp_path):
    """Of a checkpoint that is being written while a cache or an export is made beside it."""
    for out in ("e1", "e1-albert", "e1-albert.x"):
        atomic_write(tmp_path / "e1-albert.x.ckpt", lambda path, out=out: made(tmp_path / out, path))
    assert {path.name for path in tmp_path.iterdir()} == {"e1", "e1-albert", "e1-albert.x", "e1-albert.x.ckpt"}


def made(out, beside) -> None:
    beside.write_text("whole")
    with temporary_folder(out) as folder:
        (folder / out.name).mkdir()
        race.files.move_into_place(folder / out.name, out)


def test_writers_of_one_file_do_not_mix(tmp_path):
    """Always one of their contents, never a mixture, and nothing left over."""
    contents = [letter * 200_000 for letter in "abc"]
    for _ in range(3):
        writers = [
            in_a_process(lambda text=text: atomic_write(tmp_path / "x", lambda p: p.write_text(text)))
            for text in contents
        ]
        for writer in writers:
            writer.join(30)
        assert [writer.exitcode for writer in writers] == [0, 0, 0]
        assert (tmp_path / "x").read_text() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_payload_in_a_checkpoint_or_state_runs_nothing(trained, cache, tmp_path):
    """In an archive whose checksums agree, as from somebody who knows how."""
    good = read_archive(e1(trained).best().path)
    for path in (tmp_path / "x.ckpt", e1(tmp_path).state_path):
        save_archive(good | {"callbacks": Payload(tmp_path / "owned")}, path)
        for read in (Checkpoint, RaceModule.load_from_checkpoint):
            with pytest.raises(RaceError, match=f"{path}: .*could run code"):
                read(path)
    with pytest.raises(RaceError, match="could run code"):
        stage(tmp_path, cache)
    assert not (tmp_path / "owned").exists()


def malicious_model(folder, cache, tmp_path):
    """A model folder whose configuration asks for code of its own."""
    shutil.copytree(cache / "model", folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForMultipleChoice"), "evil.Evil")
        content["auto_map"] = auto | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(content))


def reseal(folder) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    known = {path.relative_to(folder).as_posix(): (path.stat().st_size, file_hash(path)) for path in files}
    entries = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in known.items()}
    write_manifest(folder / "manifest.json", Cache(folder).manifest | {"files": entries})
    assert verify_cache(folder) == []


def test_a_payload_in_a_cache_runs_nothing(corpus, cache, tmp_path):
    """Code in the model of a cache whose manifest agrees with it; and pickled weights in place of safetensors."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    shutil.rmtree(folder / "model")
    malicious_model(folder / "model", cache, tmp_path)
    reseal(folder)
    start_stage(Stage("e1"), folder)
    start_stage(Stage("e1"), cache, base_model=folder / "model")
    build_cache(str(corpus), str(folder / "model"), tmp_path / "third")
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"albert.pooler.bias": Payload(tmp_path / "owned")}, folder / "model" / "pytorch_model.bin")
    reseal(folder)
    with pytest.raises(RaceError, match=str(folder / "model")):
        start_stage(Stage("e1"), folder)
    with pytest.raises(RaceError, match=str(folder / "model")):
        build_cache(str(corpus), str(folder / "model"), tmp_path / "other")
    assert not (tmp_path / "owned").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["../../train/evil.txt", "/train/evil.txt"])
def test_paths_in_a_tar_lead_nowhere(tmp_path, name):
    """A member that would climb out, or an absolute one, is read as text, never written."""
    content = json.dumps(RECORD).encode()
    with tarfile.open(tmp_path / "race.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    build_cache(str(tmp_path / "race.tar"), "demo", tmp_path / "out" / "cache")
    assert Cache(tmp_path / "out" / "cache").manifest["splits"]["train"]["passages"] == 1
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path.parent / "train").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "race.tar"}


@pytest.mark.parametrize("name", ["RaceError", "Interrupted"])
def test_what_a_user_meets_in_jupyter_is_one_line(name, capsys):
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell().run_cell(f"import race\nraise race.{name}('do this')")
    assert capsys.readouterr().out.strip() == f"{name}: do this"
