"""Replacing a folder as a whole: kills, a full disk, odd places and file systems."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import build
from faults import add_others, digests
from test_saving import masked
from transformers import AutoModelForSequenceClassification

from hf_slim import folders, save_slimmed
from hf_slim.folders import check_folder, replacing

TESTS = Path(__file__).parent


def write_old(folder):
    """What stands for an old slim folder, and the contents of its other files."""
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "model.safetensors").write_text("old")
    (folder / "modeling_hf_slim.py").write_text("old")
    return add_others(folder)


def replace(folder):
    with replacing(folder) as new:
        (new.path / "config.json").write_text("new")
        (new.path / "model.safetensors").write_text("new")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.*") if p.is_file()}


NEW = {
    "config.json": "new",
    "model.safetensors": "new",
    "notes.txt": "mine",
    "checkpoint-3/model.safetensors": "weights of the checkpoint",
    "checkpoint-3/trainer_state.json": "{\n}\n",
}


def run_script(arguments, timeout=600):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=timeout
    )


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (("--kills", 20), "20 of 20 end bit-equal, none lost a checkpoint"),
        (("--saves", 25), "25 of 25 leave the old folder or the new one, whole"),
    ],
)
def test_processes_that_are_killed(arguments, end):
    done = run_script([TESTS / "faults.py", *arguments])
    assert done.stdout.splitlines()[-1:] == [end], done.stdout + done.stderr[-3000:]
    assert done.returncode == 0


def test_other_files_stay(tmp_path):
    others = write_old(tmp_path / "slim")
    (tmp_path / "slim").chmod(0o750)
    number = (tmp_path / "slim" / "notes.txt").stat().st_ino
    replace(tmp_path / "slim")
    assert contents(tmp_path / "slim") == NEW
    assert others.items() <= digests(tmp_path / "slim").items()
    assert others["link"] == "to notes.txt"
    assert (tmp_path / "slim" / "notes.txt").stat().st_ino == number  # the file itself, no copy of it
    assert (tmp_path / "slim").stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_a_new_folder_in_new_folders(tmp_path):
    replace(tmp_path / "a" / "b" / "slim")
    assert contents(tmp_path / "a" / "b" / "slim") == {"config.json": "new", "model.safetensors": "new"}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["slim"]


DISK_FULL = """
import resource, sys
from conftest import build
from hf_slim import save_slimmed
model = build("bert", seed=9)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save_slimmed(model, sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [300, 60_000])
def test_a_disk_that_is_full(size, tmp_path):
    """A limit on the size of files, beyond which a write fails as on a full disk: in the config, in the weights."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python sets it
    save_slimmed(masked(), tmp_path / "slim")
    add_others(tmp_path / "slim")
    before = digests(tmp_path / "slim")
    done = run_script(["-c", DISK_FULL, tmp_path / "slim", size])
    assert done.stdout.startswith(f"The folder {tmp_path / 'slim'} could not be written: "), done.stderr[-3000:]
    assert "File too large" in done.stdout and "What was there before is unchanged." in done.stdout
    assert digests(tmp_path / "slim") == before
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path):
    class BadTokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    save_slimmed(masked(), tmp_path / "slim")
    before = digests(tmp_path / "slim")
    with pytest.raises(OSError, match=f"^The folder {tmp_path}/slim could not be written: disk full. What was there"):
        save_slimmed(build("bert", seed=9), tmp_path / "slim", processing_class=BadTokenizer())
    assert digests(tmp_path / "slim") == before
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_a_mount_point_is_refused():
    with pytest.raises(OSError, match="output_dir='/proc' is a mount point and cannot be replaced as a whole; name a"):
        save_slimmed(masked(), "/proc")


@pytest.mark.parametrize("folder", ["/proc/slim", "/proc/a/b/slim", "/sys/kernel"])
def test_a_folder_that_cannot_be_written_is_refused(folder):
    """Not even by root, whom permissions do not hold back."""
    with pytest.raises(PermissionError, match=f"output_dir='{folder}' cannot be written: "):
        save_slimmed(masked(), folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="slim' cannot be written: .*Permission denied"):
        check_folder(tmp_path / "slim")


def test_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_slimmed(masked(), ".")
    assert os.getcwd() == str(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(".")


def test_a_current_folder_inside(tmp_path, monkeypatch):
    write_old(tmp_path / "slim")
    monkeypatch.chdir(tmp_path / "slim" / "checkpoint-3")
    replace(tmp_path / "slim")
    assert os.getcwd() == str(tmp_path / "slim" / "checkpoint-3")
    assert Path("trainer_state.json").read_text() == "{\n}\n" and Path("../config.json").read_text() == "new"


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch):
    write_old(tmp_path / "slim")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    replace(tmp_path / "slim")
    assert contents(tmp_path / "slim") == NEW


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("disk")
    save_slimmed(masked(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {"notes.txt", "model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "disk").iterdir()}


def test_nothing_is_left_of_an_old_model(tmp_path):
    build("bert", hidden_size=64).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_slimmed(masked(), tmp_path)
    names = ["README.md", "config.json", "model.safetensors", "modeling_hf_slim.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    save_slimmed(masked("llama"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors")
    ]


class NoExchange:
    """A C library whose `renameat2` fails."""

    def __init__(self, problem):
        self.problem = problem

    def renameat2(self, *arguments):
        ctypes.set_errno(self.problem)
        return -1


def use_two_renames(monkeypatch, how):
    if how == "other system":
        monkeypatch.setattr(folders, "sys", SimpleNamespace(platform="darwin"))
    elif how == "old library":
        monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **keywords: SimpleNamespace())
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **keywords: NoExchange(how))


@pytest.mark.parametrize("how", ["other system", "old library", errno.EINVAL, errno.ENOSYS])
def test_two_renames_where_folders_cannot_be_exchanged(how, tmp_path, monkeypatch):
    write_old(tmp_path / "slim")
    monkeypatch.chdir(tmp_path / "slim")
    use_two_renames(monkeypatch, how)
    ctypes.set_errno(0)
    replace(tmp_path / "slim")
    assert contents(tmp_path / "slim") == NEW
    assert os.listdir() == os.listdir(tmp_path / "slim")
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_if_the_second_rename_fails(error, tmp_path, monkeypatch):
    write_old(tmp_path / "slim")
    before = digests(tmp_path / "slim")
    use_two_renames(monkeypatch, "other system")
    rename, calls = os.rename, []

    def failing(source, destination):
        calls.append(Path(destination).name)
        if len(calls) == 2:
            raise error
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(type(error)):
        replace(tmp_path / "slim")
    assert calls == ["slim.old", "slim", "slim"]
    assert digests(tmp_path / "slim") == before
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_an_exchange_that_is_forbidden(tmp_path, monkeypatch):
    write_old(tmp_path / "slim")
    before = digests(tmp_path / "slim")
    use_two_renames(monkeypatch, errno.EACCES)
    with pytest.raises(OSError, match=f"^The folder {tmp_path}/slim could not be written: .*Permission denied"):
        replace(tmp_path / "slim")
    assert digests(tmp_path / "slim") == before
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


@pytest.mark.parametrize("problem", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS])
def test_copies_where_the_file_system_has_no_hard_links(problem, tmp_path, monkeypatch):
    others = write_old(tmp_path / "slim")
    number = (tmp_path / "slim" / "notes.txt").stat().st_ino

    def failing(*arguments, **keywords):
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(os, "link", failing)
    replace(tmp_path / "slim")
    assert contents(tmp_path / "slim") == NEW
    assert others.items() <= digests(tmp_path / "slim").items()
    assert (tmp_path / "slim" / "notes.txt").stat().st_ino != number


def test_a_file_that_cannot_be_linked(tmp_path, monkeypatch):
    write_old(tmp_path / "slim")
    before = digests(tmp_path / "slim")

    def failing(*arguments, **keywords):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", failing)
    with pytest.raises(OSError, match="could not be written: .*Input/output error.* What was there before is unchang"):
        replace(tmp_path / "slim")
    assert digests(tmp_path / "slim") == before
