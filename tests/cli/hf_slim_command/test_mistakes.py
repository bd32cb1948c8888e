"""What is answered in one line, and what keeps its traceback."""

import pytest
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, TrainingArguments
from transformers.utils.versions import require_version

from hf_slim import SlimConfig
from hf_slim.cli.hf_slim_command.mistakes import is_mistake, print_mistake


def _catch(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "call",
    [
        lambda: SlimConfig(ffn2_sparsity=2),
        lambda: validate_repo_id("a/b/c"),
        lambda: open("/nowhere"),
        lambda: require_version("no-such-package>=1"),
        lambda: AutoConfig.from_pretrained("/nowhere"),
        lambda: TrainingArguments(report_to="none", save_strategy="steps", load_best_model_at_end=True),
    ],
)
def test_what_the_user_can_mend_is_a_mistake(call):
    assert is_mistake(_catch(call))


@pytest.mark.parametrize(
    "call",
    [
        lambda: int("x"),
        lambda: SlimConfig.from_arguments.__func__(lambda **_: int("x"), SlimConfig()),  # within hf_slim, not by it
        lambda: (_ for _ in ()).throw(ValueError("of another module")),
        lambda: [][0],
        lambda: SlimConfig(no_field=1),
    ],
)
def test_anything_else_is_a_bug(call):
    assert not is_mistake(_catch(call))


def test_a_mistake_is_one_line(capsys):
    assert print_mistake("hf-slim run", ValueError("two\n\n  lines ")) == 2
    assert capsys.readouterr().err == "hf-slim run: error: two lines\n"
