"""A Python that has imported everything once, for the many processes of the tests: each of them is a fork of it.

`running_python` has it started. Two processes listen: one that has transformers but not hf_slim, and one, forked from
it, that has both and has saved a model, so that what transformers and hf_slim import late is there, too. Small
commands, `python`, `torchrun` and the like, ask one of them for a fork that does what the real command would, with the
arguments, the folder, the environment and the open files of the command.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

TESTS = Path(__file__).parent
COMMANDS = ("python", "torchrun", "accelerate", "hf-slim")
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({socket!r})
    socket.send_fds(line, [b" "], [0, 1, 2])
    asked = {{"arguments": sys.argv, "environment": dict(os.environ), "folder": os.getcwd()}}
    line.sendall(json.dumps(asked).encode() + b"\\n")
    status = int(line.makefile().readline() or 1)
sys.exit(status if status >= 0 else 128 - status)
"""


class Done(NamedTuple):
    """What a script did."""

    status: int
    stdout: str
    stderr: str


class WarmPython(NamedTuple):
    """The processes: the folder of their commands, and what they have in their environment beside that of this one."""

    folder: Path
    variables: Mapping[str, str]

    def commands(self, library: bool = True) -> Path:
        """The folder of `python` and the other commands.

        Args:
            library: Whether hf_slim is there; else it cannot be imported either.

        Returns:
            The folder.
        """
        return self.folder / ("whole" if library else "bare")

    def environment(self, **changes: str) -> dict[str, str]:
        """That of this process, in which a shell finds the commands, and `torchrun` the `python` among them."""
        path = os.pathsep.join([str(self.commands()), str(Path(sys.executable).parent), os.environ["PATH"]])
        python = str(self.commands() / "python")
        return {**os.environ, **self.variables, "PATH": path, "PYTHON_EXEC": python, **changes}

    def run(
        self,
        script: str,
        *arguments: object,
        library: bool = True,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Done:
        """Run a script in a fork.

        Args:
            script: The code.
            *arguments: What `sys.argv` has behind the name.
            library: Whether hf_slim is there; else it cannot be imported either.
            environment: Variables that are read when they are used, not when modules are imported.
            cwd: The folder to run it in.

        Returns:
            What it did.
        """
        done = subprocess.run(
            [self.commands(library) / "python", "-c", script, *map(str, arguments)],
            env=self.environment(**(environment or {})),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def running_python(folder: Path, environment: Mapping[str, str], modules: Sequence[str]) -> Iterator[WarmPython]:
    """Have the processes started and stopped.

    Args:
        folder: A folder of its own; its path is short.
        environment: Theirs, beside that of this process; what is read when modules are imported stays as it is here.
        modules: What to import, where it is installed.

    Yields:
        What runs scripts and commands.
    """
    for name in ("whole", "bare"):
        (folder / name).mkdir()
        client = CLIENT.format(python=sys.executable, socket=f"{folder}/{name}.socket")
        for command in COMMANDS:
            (folder / name / command).write_text(client)
            (folder / name / command).chmod(0o755)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with subprocess.Popen(
        [sys.executable, __file__, folder, *modules],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert "ready\n" in iter(process.stdout.readline, ""), "the process has ended"  # others print, too
            yield WarmPython(folder, environment)
        finally:
            process.stdin.close()  # both of them end with it
            process.wait(timeout=30)


def _serve(path: str) -> None:
    """Fork for each that asks, until stdin is closed; returns in the forks, when they have done what was asked."""
    gc.collect()
    gc.freeze()  # or every collection in a fork goes through all that was imported
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    signal.signal(signal.SIGCHLD, lambda *_: _bury())
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        if path.endswith("whole.socket"):
            print("ready", flush=True)
        while True:
            line, _ = server.accept()
            if os.fork() == 0:
                _answer(line)
            line.close()


def _bury() -> None:
    """Take note of the ends of forks."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(line: socket.socket) -> None:
    """In the first fork: have what is asked for done in a second one, and say how that ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    files = socket.recv_fds(line, 1, 3)[1]
    asked = json.loads(line.makefile().readline())
    child = os.fork()
    if child == 0:
        line.close()
        _become(asked, files)
    for file in files:
        os.close(file)
    # Who asked was killed if nothing more can be read from it.
    threading.Thread(target=lambda: (line.recv(1), os.kill(child, signal.SIGKILL)), daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line.sendall(b"%d\n" % status)
    os._exit(0)


def _become(asked: dict, files: list[int]) -> None:
    """In the second fork: do what the command does, and end."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    status = 0
    try:
        _run_command(*asked["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_command(command: str, *arguments: str) -> None:
    """What the command would do in an interpreter of its own."""
    name = Path(command).name
    if name != "python":
        sys.argv = [command, *arguments]
        runpy.run_path(str(Path(sys.executable).with_name(name)), run_name="__main__")
        return
    first, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    if first == "-c":
        code, *rest = rest
        script = sys.modules["__main__"] = ModuleType("__main__")
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(compile(code, "<string>", "exec"), vars(script))
    elif first == "-m":
        module, *rest = rest
        sys.argv, sys.path[0] = [module, *rest], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _import_libraries(modules: Sequence[str]) -> None:
    """These, and what is imported late when a model is saved and loaded."""
    for name in modules:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
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


def main(folder: str, *modules: str) -> None:
    """Import, fork, and serve in both processes."""
    _import_libraries(modules)
    assert "hf_slim" not in sys.modules
    if os.fork() == 0:
        _import_hf_slim()
        _serve(f"{folder}/whole.socket")
    sys.modules["hf_slim"] = None  # type: ignore[assignment]  # importing it fails
    _serve(f"{folder}/bare.socket")


if __name__ == "__main__":
    main(*sys.argv[1:])
