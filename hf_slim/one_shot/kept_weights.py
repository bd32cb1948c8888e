"""What a model was before it was slimmed, kept on disk until it is known that all went well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..parallel import change_tensor
from ..proof import Snapshot
from ..structures import get_tensor


def finish(action: Callable[[], None]) -> None:
    """Do what must be done at the end; if an interrupt falls into it, once more, before that is raised.

    Args:
        action: What can be done twice.
    """
    try:
        action()
    except BaseException:
        action()
        raise


class KeptWeights:
    """Puts a model back as it was, bit for bit, if anything is raised in it.

    When nothing was raised in it, all is done: an interrupt while the files are deleted leaves the model changed.

    Args:
        model: The model. Its weights are written to a temporary file each, so that they take no memory.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        self._model = model
        self._snapshot = Snapshot(model)
        self._folder = TemporaryDirectory(prefix="hf_slim-")
        self._files: dict[str, Path] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Write down tensors before they change; once is enough.

        Args:
            names: Dotted names of parameters and buffers.
        """
        for name in dict.fromkeys(names):
            if name not in self._files:
                path = Path(self._folder.name, f"{len(self._files)}.safetensors")
                save_file({"tensor": get_tensor(self._model, name).detach().cpu().contiguous()}, path)
                self._files[name] = path

    def __enter__(self) -> KeptWeights:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put all back where something was raised, and delete the files."""
        try:
            if error is not None:
                finish(self._put_back)
        finally:
            finish(self._folder.cleanup)

    def _put_back(self) -> None:
        self._snapshot.put_back()
        for name, path in self._files.items():
            self._restore(name, load_file(path)["tensor"])

    @torch.no_grad()
    def _restore(self, name: str, values: torch.Tensor) -> None:
        tensor = get_tensor(self._model, name)
        if tensor.shape == values.shape:
            tensor.copy_(values)
        else:
            change_tensor(self._model, name, lambda old: values.to(old.device))
