"""Replacing a folder as a whole: kills, a full disk, odd places and file systems."""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import build, logits, make_batch
from faults import add_others, digests
from safetensors import SafetensorError
from sparse_models import Holder, masked
from transformers import AutoModelForSequenceClassification

from hf_slim import model_slim, save_slimmed
from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.proof.output_comparison import VerificationError
from hf_slim.saving import atomic_folder
from hf_slim.saving.atomic_folder import check_folder, replacing

TESTS = Path(__file__).parents[1]


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


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (("--kills", 6), "6 of 6 end bit-equal, none lost a checkpoint"),
        (("--saves", 13), "13 of 13 leave the old folder or the new one, whole"),
        pytest.param(("--kills", 20), "20 of 20 end bit-equal, none lost a checkpoint", marks=pytest.mark.slow),
        pytest.param(("--saves", 25), "25 of 25 leave the old folder or the new one, whole", marks=pytest.mark.slow),
    ],
)
def test_processes_that_are_killed(arguments, end, warm_python):
    command = ["python", TESTS / "faults.py", *map(str, arguments)]
    done = subprocess.run(command, env=warm_python.environment(), capture_output=True, text=True, timeout=600)
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
def test_a_disk_that_is_full(size, warm_python, tmp_path):
    """A limit on the size of files, beyond which a write fails as on a full disk: in the config, in the weights."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python sets it
    save_slimmed(masked(), tmp_path / "slim")
    add_others(tmp_path / "slim")
    before = digests(tmp_path / "slim")
    done = warm_python.run(DISK_FULL, tmp_path / "slim", size)
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


def test_a_disk_that_is_really_full(small_disk):
    """Whichever file no longer fits, also the tokenizer's and those of torch.save, whose errors are no OSError."""
    save_slimmed(masked(), small_disk / "slim")
    before, names = digests(small_disk / "slim"), os.listdir(small_disk)
    model, tokenizer, reasons = WithBin(build("bert", seed=9)), make_byte_tokenizer(), []
    tokenizer.add_tokens([f"word{number}" for number in range(2000)])
    for room in range(0, 2**21, 2**14):
        filler = small_disk / "filler"
        fill(filler, room)
        try:
            save_slimmed(model, small_disk / "slim", processing_class=tokenizer, verify=False)
            break
        except OSError as error:
            assert str(error).startswith(f"The folder {small_disk}/slim could not be written: ")
            assert str(error).endswith(". What was there before is unchanged.")
            reasons.append(type(error.__cause__))
            assert error.errno == (errno.ENOSPC if isinstance(error.__cause__, OSError) else None)
        finally:
            filler.unlink()
        assert digests(small_disk / "slim") == before and os.listdir(small_disk) == names
    assert {Exception, RuntimeError, SafetensorError} <= {*reasons}
    assert (small_disk / "slim" / "head.bin").exists()


class WithBin(Holder):
    def save_pretrained(self, folder):
        super().save_pretrained(folder)
        torch.save({"head": torch.ones(30_000)}, f"{folder}/head.bin")


def fill(path, room):
    """Write a file that leaves room for so many bytes."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(path, max(path.stat().st_size - room, 0))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_folders_that_were_made_for_a_save_that_failed_go(tmp_path):
    class BadTokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a/b/c/slim could not be written: disk full"):
        save_slimmed(masked(), tmp_path / "a" / "b" / "c" / "slim", processing_class=BadTokenizer())
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


@pytest.mark.parametrize("inplace", [True, False])
def test_a_failed_save_leaves_the_config(inplace, tmp_path, monkeypatch):
    """In place and without a comparison the model itself is what is saved."""
    model = masked()
    before = model.config.to_dict()
    if inplace:
        before = model_slim(masked()).config.to_dict()

    def failing(self, folder, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", failing)
    with pytest.raises(OSError, match="disk full"):
        save_slimmed(model, tmp_path / "slim", verify=not inplace, inplace=inplace)
    assert model.config.to_dict() == before
    assert list(tmp_path.iterdir()) == []


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
    names = ["README.md", "config.json", "hf_slim_layers.svg", "model.safetensors", "modeling_hf_slim.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "slim_report.json"]
    save_slimmed(masked("llama"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "hf_slim_layers.svg", "model.safetensors"),
        "slim_report.json",
    ]


def test_nothing_is_left_of_an_old_adapter(tmp_path):
    """Or from_pretrained would lay it over the merged weights."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'hf-slim[integrations]'")
    model = peft.get_peft_model(masked(), peft.LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_text("an older one")
    assert (tmp_path / "adapter_model.safetensors").exists()
    save_slimmed(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", "checkpoint-1", "config.json", "hf_slim_layers.svg", "model.safetensors"),
        *("modeling_hf_slim.py", "slim_report.json"),
    ]
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").read_text() == "an older one"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = make_batch(model.get_base_model())
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=1e-4)


class Settled(Holder):
    """Loads what else is in its folder, too."""

    @classmethod
    def from_pretrained(cls, folder):
        loaded = super().from_pretrained(folder)
        if Path(folder, "bias.txt").exists():
            loaded.model.classifier.bias.data += float(Path(folder, "bias.txt").read_text())
        return loaded


def test_what_is_checked_is_the_folder_as_it_will_be(tmp_path):
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "bias.txt").write_text("0")
    save_slimmed(Settled(masked()), tmp_path / "slim")
    (tmp_path / "slim" / "bias.txt").write_text("1")
    before = digests(tmp_path / "slim")
    with pytest.raises(VerificationError, match="Settled loads another model.classifier.bias from the saved folder"):
        save_slimmed(Settled(masked()), tmp_path / "slim")
    assert digests(tmp_path / "slim") == before and os.listdir(tmp_path) == ["slim"]


def test_other_files_in_folders_that_are_written_stay(tmp_path):
    """Only the old model in them goes; folders of the same name as a file do not."""
    old = tmp_path / "slim"
    write_old(old)
    write_old(old / "inner")
    (old / "inner" / "adapter_config.json").write_text("old")
    (old / "inner" / "deep").mkdir()
    (old / "inner" / "deep" / "model.safetensors").write_text("of something else")
    (old / "inner" / "gone").symlink_to("nowhere")
    with replacing(old) as new:
        (new.path / "inner").mkdir()
        (new.path / "inner" / "config.json").write_text("new")
        new.join_others()
        assert new.written == (PurePosixPath("inner/config.json"),)
        assert (new.path / "inner" / "notes.txt").read_text() == "mine"
    found = contents(old)
    assert found == {
        "config.json": "old",
        "inner/config.json": "new",
        "inner/deep/model.safetensors": "of something else",
        **{place: text for place, text in NEW.items() if place[0] in "nc" and text != "new"},
        **{f"inner/{place}": text for place, text in NEW.items() if text != "new"},
    }
    assert os.readlink(old / "inner" / "gone") == "nowhere"


def test_files_that_come_while_the_new_folder_is_checked_stay(tmp_path):
    write_old(tmp_path / "slim")
    with replacing(tmp_path / "slim") as new:
        (new.path / "config.json").write_text("new")
        new.join_others()
        (tmp_path / "slim" / "log.txt").write_text("late")
        (tmp_path / "slim" / "checkpoint-3" / "model-2.safetensors").write_text("late")
    assert new.written == (PurePosixPath("config.json"),)
    assert contents(tmp_path / "slim") == {
        **{place: text for place, text in NEW.items() if place != "model.safetensors"},
        "log.txt": "late",
        "checkpoint-3/model-2.safetensors": "late",
    }


class NoExchange:
    """A C library whose `renameat2` fails."""

    def __init__(self, problem):
        self.problem = problem

    def renameat2(self, *arguments):
        ctypes.set_errno(self.problem)
        return -1


def use_two_renames(monkeypatch, how):
    if how == "other system":
        monkeypatch.setattr(atomic_folder, "sys", SimpleNamespace(platform="darwin"))
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
