"""Folders that are replaced whole: at every moment the old one is there, or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_MODEL_FILES = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?|modeling_hf_slim\.py")
"""What an old model may have left that a new one must not be mixed with."""

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


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of another when all is written.

    Other files and folders in the old one, but for those of an old model, are in the new one, too. A process that is
    killed leaves the old folder or the new one whole, and perhaps a folder `.NAME.*` beside it, which may be deleted.
    Where the system cannot exchange two folders at once (other systems than Linux, some network file systems), the old
    folder is away for the moment between two renames, and lies in that folder beside it.

    Args:
        target: The folder to replace, which need not exist.

    Yields:
        The empty new folder.

    Raises:
        OSError: If writing fails; the old folder is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        ) as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()
            yield folder
            if target.exists():
                shutil.copymode(target, folder)
                _link_others(target, folder)
                _exchange(folder, target)
            else:
                os.rename(folder, target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The folder {target} could not be written: {error}. What was there before is unchanged."
        ) from error


def _link_others(old: Path, new: Path) -> None:
    for path in old.iterdir():
        copy = new / path.name
        if copy.exists() or _MODEL_FILES.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, copy, copy_function=_link, symlinks=True)
        else:
            _link(path, copy)


def _link(path: str | Path, copy: str | Path) -> None:
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
