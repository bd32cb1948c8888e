"""Folders that are replaced whole: at every moment the old one is there, or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

_MODEL_FILES = re.compile(
    r"(model|pytorch_model|adapter_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_config\.json|modeling_hf_slim\.py"
)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Refuse a folder that cannot be written or replaced.

    Args:
        output_dir: The folder, which need not exist.

    Returns:
        Its absolute path.

    Raises:
        OSError: If it is a file or a mount point, or the folder that it lies in cannot be written.
    """
    target = Path(output_dir).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"output_dir={str(output_dir)!r} is a file; name a folder.")
    if os.path.ismount(target):
        raise OSError(
            f"output_dir={str(output_dir)!r} is a mount point and cannot be replaced as a whole; name a folder in it."
        )
    beside = next(path for path in target.parents if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=beside).cleanup()
    except OSError as error:
        raise PermissionError(f"output_dir={str(output_dir)!r} cannot be written: {error}.") from error
    return target


class NewFolder:
    """A folder that is being written, and takes the place of an old one when all is there.

    Args:
        path: The new folder, empty.
        old: The folder whose place it takes, which need not exist.

    Attributes:
        path: The new folder.
        written: The files that were written to it, in order; empty before `join_others`.
    """

    def __init__(self, path: Path, old: Path) -> None:
        """See the class."""
        self.path = path
        self.written: tuple[PurePosixPath, ...] = ()
        self._old = old

    def join_others(self) -> None:
        """Let the old folder's other files and folders be in the new one, too, which is then as it will be.

        Files of an old model are left out wherever files were written to the same folder.
        """
        self.written = self.written or tuple(
            PurePosixPath(path.relative_to(self.path)) for path in sorted(self.path.rglob("*")) if not path.is_dir()
        )
        if self._old.exists():
            shutil.copymode(self._old, self.path)
            _link_others(self._old, self.path, PurePosixPath(), self.written)


def is_replaced(path: PurePosixPath, written: Collection[PurePosixPath]) -> bool:
    """Whether a file belongs to an old model whose place a new one takes.

    Args:
        path: The file, relative to the folder.
        written: The files of the new model, likewise.

    Returns:
        True if the new model must not be mixed with it: other weights, adapters, indices and remote code beside files
        of the new model, but for those that are themselves files of the new one.
    """
    beside = path.parent == PurePosixPath() or any(path.parent == other.parent for other in written)
    return beside and path not in written and _MODEL_FILES.fullmatch(path.name) is not None


@contextmanager
def replacing(target: Path) -> Iterator[NewFolder]:
    """A new folder to write to, which takes the place of another when all is written.

    Other files and folders in the old one, but for those of an old model, are in the new one, too: from
    `NewFolder.join_others` on, or from the end of the block. A process that is killed leaves the old folder or the new
    one whole, and perhaps a folder `.NAME.*` beside it, which may be deleted. Where the system cannot exchange two
    folders at once (other systems than Linux, some network file systems), the old folder is away for the moment
    between two renames, and lies in that folder beside it.

    Args:
        target: The folder to replace, which need not exist.

    Yields:
        The new folder, empty.

    Raises:
        OSError: If writing fails; the old folder is as it was.
    """
    new = None
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        ) as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()
            new = NewFolder(folder, target)
            yield new
            new.join_others()  # also what others have written to the old folder while the new one was checked
            if target.exists():
                _exchange(folder, target)
            else:
                os.rename(folder, target)
    except Exception as error:
        if not _is_failed_write(error, still_writing=new is None or not new.written):
            raise
        refused = OSError(f"The folder {target} could not be written: {error}. What was there before is unchanged.")
        refused.errno = getattr(error, "errno", None)
        raise refused from error
    finally:
        for parent in () if target.exists() else made:
            with suppress(OSError):  # it was not made, or holds something by now
                parent.rmdir()


def _is_failed_write(error: Exception, *, still_writing: bool) -> bool:
    """Whether a file could not be written; torch and tokenizers raise these two classes themselves, no others."""
    return isinstance(error, (OSError, SafetensorError)) or (
        still_writing and type(error) in (RuntimeError, Exception)
    )


def _link_others(old: Path, new: Path, inside: PurePosixPath, written: Collection[PurePosixPath]) -> None:
    for path in old.iterdir():
        copy, place = new / path.name, inside / path.name
        if path.is_dir() and not path.is_symlink():
            is_made = not os.path.lexists(copy)
            if is_made:
                copy.mkdir()
            if copy.is_dir():
                _link_others(path, copy, place, written)
            if is_made:
                shutil.copystat(path, copy)
        elif not os.path.lexists(copy) and not is_replaced(place, written):
            _link(path, copy)


def _link(path: Path, copy: Path) -> None:
    """A second name for a file, which costs no space; a copy where the file system has no such thing."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS):
            raise
        shutil.copy2(path, copy, follow_symlinks=False)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change places; the working directory goes with the name, not with the folder."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed, so it is not in the folder
        here = Path()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        paths = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
        exchanged = hasattr(libc, "renameat2") and libc.renameat2(*paths, _RENAME_EXCHANGE) == 0
        problem = ctypes.get_errno()
        if not exchanged and problem not in (0, errno.ENOSYS, errno.EINVAL):
            raise OSError(problem, os.strerror(problem), str(old))
    else:
        exchanged = False
    if not exchanged:
        aside = new.with_name(f"{new.name}.old")
        try:
            os.rename(old, aside)
            os.rename(new, old)
        except BaseException:
            if not old.exists():  # or it would go with the temporary folder that it lies in now
                os.rename(aside, old)
            raise
    if here == old or old in here.parents:
        os.chdir(here)
