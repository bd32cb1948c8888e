"""Runs scripts in forks of a process that has imported everything once: `python tests/hub_worker.py SOCKET`.

Two such processes listen: one that has transformers but not hf_slim, at SOCKET.bare, and one, forked from it, that has
both and has saved a model, so that what transformers and hf_slim import late is there, too, at SOCKET.whole.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent


class Done(NamedTuple):
    """What a script did."""

    status: int
    stdout: str
    stderr: str


class Worker(NamedTuple):
    """The processes, and the folder of their sockets and outputs."""

    folder: Path

    def run(
        self, script: str, *arguments: object, library: bool = True, environment: Mapping[str, str] | None = None
    ) -> Done:
        """Run a script in a fork.

        Args:
            script: The code.
            *arguments: What `sys.argv` has behind the name.
            library: Whether hf_slim is there; else it cannot be imported either.
            environment: Variables that are read when they are used, not when modules are imported.

        Returns:
            What it did.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as outputs, socket.socket(socket.AF_UNIX) as line:
            line.settimeout(120)
            line.connect(str(self.folder / f"socket.{'whole' if library else 'bare'}"))
            asked = {
                "script": script,
                "arguments": ["-c", *map(str, arguments)],
                "environment": dict(environment or {}),
                "outputs": outputs,
            }
            line.sendall(json.dumps(asked).encode() + b"\n")
            status = int(line.makefile().readline())
            return Done(status, *(Path(outputs, name).read_text() for name in ("stdout", "stderr")))


@contextmanager
def running_worker(folder: Path, environment: Mapping[str, str]) -> Iterator[Worker]:
    """Have the processes started and stopped.

    Args:
        folder: A folder of its own; its path is short.
        environment: Theirs, beside that of this process.

    Yields:
        What runs scripts.
    """
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with subprocess.Popen(
        [sys.executable, __file__, folder / "socket"],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield Worker(folder)
        finally:
            process.stdin.close()  # both of them end with it
            process.wait(timeout=30)


def _serve(path: str) -> None:
    """Run what is asked for, one script after the other, until stdin is closed."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        if path.endswith(".whole"):
            print("ready", flush=True)
        while True:
            line, _ = server.accept()
            with line:
                asked = json.loads(line.makefile().readline())
                child = os.fork()
                if child == 0:
                    _run(asked)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                line.sendall(b"%d\n" % status)


def _run(asked: dict) -> None:
    """The fork: run the script and end."""
    status = 0
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(asked["outputs"], name), os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    try:
        sys.argv = asked["arguments"]
        os.environ.update(asked["environment"])
        exec(compile(asked["script"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_libraries() -> None:
    """What is imported late when a model is saved and loaded."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch  # noqa: F401
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: F401

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with tempfile.TemporaryDirectory() as folder:
        BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)
        BertForSequenceClassification.from_pretrained(folder)


def _import_hf_slim() -> None:
    """The same with hf_slim."""
    from sparse_models import masked

    from hf_slim import save_slimmed

    with tempfile.TemporaryDirectory() as folder:
        save_slimmed(masked(), f"{folder}/slim")


def main(path: str) -> None:
    """Import, fork, and serve in both processes."""
    _import_libraries()
    assert "hf_slim" not in sys.modules
    if os.fork() == 0:
        _import_hf_slim()
        _serve(f"{path}.whole")
    sys.modules["hf_slim"] = None  # type: ignore[assignment]  # importing it fails
    _serve(f"{path}.bare")


if __name__ == "__main__":
    main(sys.argv[1])
