"""What is a mistake of the user's, to be answered in one line, and what is a bug, which keeps its traceback."""

from __future__ import annotations

import opcode
import sys

_SPEAKING = (
    *("hf_slim", "huggingface_hub", "datasets", "transformers.configuration_utils", "transformers.core_model_loading"),
    *("transformers.dynamic_module_utils", "transformers.integrations", "transformers.modeling_utils"),
    *("transformers.models.auto", "transformers.tokenization_", "transformers.trainer", "transformers.training_args"),
    *("transformers.utils.import_utils", "transformers.utils.versions"),
)
"""Modules whose errors speak of settings and files, by what their names begin with."""
_BUGS = (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError)
_RAISE = opcode.opmap["RAISE_VARARGS"]


def is_mistake(error: Exception) -> bool:
    """Whether an error says what the user can mend, and not that code is wrong.

    That is what the system refuses (files, the network), and what a `raise` statement of ours says, or one of a module
    of Hugging Face that looks at settings and files. An error of the same class that Python or PyTorch comes upon in
    the middle of a computation is a bug.

    Args:
        error: The error, as it was caught.

    Returns:
        True if its message answers the user.
    """
    if isinstance(error, OSError):
        return True
    trace = error.__traceback__
    if trace is None or isinstance(error, _BUGS):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    is_raised = trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE
    return is_raised and trace.tb_frame.f_globals.get("__name__", "").startswith(_SPEAKING)


def print_mistake(prog: str, message: object) -> int:
    """Print one line on stderr.

    Args:
        prog: The command, such as `hf-slim run`.
        message: The error or its message; its line ends become blanks.

    Returns:
        The exit status, 2.
    """
    print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2
