"""Runs the code blocks of one Markdown page in order, in the current folder: `python tests/run_page.py README.md`.

With `--short` behind it, long trainings take a few steps.

The `python` blocks share one namespace, as if they were one script; one that begins with a comment such as
`# train.py` is written to the file of that name instead. The `bash` blocks run in a shell. What an `output` block
holds has to be what the block before it printed.
"""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

EXEMPT = (
    "pip install .",
    'pip install -e ".[test]"',
    "pytest",
)
"""Commands of bash blocks that are not run: they install the package, or start the tests that run the pages."""

SHORT = {"hf-slim demo": "hf-slim demo --max_steps 20", "--batch_sizes 1 4": "--batch_sizes 4"}
"""What takes long in commands, and what is run in its place with `--short`."""


class Block(NamedTuple):
    """A fenced block of a page, and the line on which its text begins."""

    language: str
    text: str
    line: int


def find_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that name a language."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in fences]


def find_commands(block: str) -> list[str]:
    """The commands of a bash block but for those that are exempt."""
    lines = block.replace("\\\n", " ").splitlines()
    return [command for line in lines for command in line.strip().split(" && ") if command not in (*EXEMPT, "")]


def run_page(page: Path, short: bool = False) -> None:
    """Run the blocks of a page."""
    script = sys.modules["__main__"] = ModuleType("__main__")  # classes of the page can be found by pickle
    namespace = vars(script)
    printed = ""
    for block in find_blocks(page):
        print(f"--- {page.name}, line {block.line}: {block.language}", file=sys.stderr, flush=True)
        file = re.match(r"# (\w+\.py)\n", block.text)
        if block.language == "python" and file:
            Path(file[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            stdout = io.StringIO()
            # Empty lines before the block give tracebacks the line numbers of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(stdout):
                exec(code, namespace)
            printed = stdout.getvalue()
            print(printed, flush=True)
        elif block.language == "bash":
            for command in find_commands(block.text):
                for long, quick in SHORT.items() if short else ():
                    command = command.replace(long, quick)
                subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
        elif block.language == "output" and printed.strip() != block.text.strip():
            sys.exit(f"{page.name}, line {block.line}: the page says\n{block.text}\nbut this was printed\n{printed}")


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).resolve(), sys.argv[2:] == ["--short"])
