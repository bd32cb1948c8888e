"""The model card: its metadata, its tables, and the cards of others."""

import pytest
from conftest import build
from huggingface_hub import ModelCard

from hf_slim.saving.model_card import make_model_card, rename_in_card, write_model_card
from hf_slim.saving.report import SlimReport, StructureSize

REPORT = SlimReport(
    parameters_before=1_000_000,
    parameters_after=600_000,
    bytes_before=4_000_000,
    bytes_after=2_400_000,
    structures=(StructureSize("layer.0.output", "ffn", 1536, 320), StructureSize("layer.0.attention", "mha", 12, 9)),
)
METRICS = {"eval_loss": 0.5, "eval_pearson": 1 / 3, "eval_spearman": float("nan")}
RECORD = {"version": 1}
REMOTE_CODE_NOTE = (
    "Where `hf_slim` is not installed, pass `trust_remote_code=True`: the folder holds a small file that does nothing "
    "but\ngive the model its sizes.\n"
)


def _make(family="bert", record=None, base_model="", metrics=METRICS, has_remote_code=False, title=None) -> ModelCard:
    model = build(family)
    model.config.name_or_path = base_model
    if record:
        model.config.hf_slim = record
    return make_model_card(
        model, REPORT, repo_id="me/slim-x", has_remote_code=has_remote_code, metrics=metrics, title=title
    )


def test_the_hub_finds_the_metrics_that_are_numbers():
    (index,) = _make().data.to_dict()["model-index"]
    assert index == {
        "name": "slim-x",
        "results": [
            {
                "task": {"type": "text-classification"},
                "dataset": {"name": "Unknown", "type": "unknown"},
                "metrics": [{"type": "loss", "value": 0.5}, {"type": "pearson", "value": 1 / 3}],
            }
        ],
    }


@pytest.mark.parametrize("metrics", [{}, {"eval_loss": float("inf")}])
def test_without_numbers_there_is_no_index(metrics):
    assert _make(metrics=metrics).data.to_dict() == {"library_name": "transformers", "tags": ["hf_slim", "pruning"]}


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "text-generation"), ("t5", "text2text-generation"), ("roberta", "fill-mask"), ("vit", None)],
)
def test_the_task_is_that_of_the_class(family, task):
    (result, *_) = _make(family).data.eval_results
    assert result.task_type == (task or "image-classification")


def test_a_class_without_a_task():
    model = build("bert").bert
    card = make_model_card(model, REPORT, repo_id="x", has_remote_code=False, metrics={"eval_loss": 1})
    assert card.data.eval_results[0].task_type == "other"


def test_the_whole_text():
    card = _make(record=RECORD, base_model="google/bert", has_remote_code=True)
    assert card.data.base_model == "google/bert"
    assert card.text.strip() == (
        "# slim-x\n\n"
        "[google/bert](https://huggingface.co/google/bert) with 60% of its parameters: intermediate channels and "
        "attention heads were removed physically with [hf_slim](https://pypi.org/project/hf-slim).\n\n"
        "|  | before | after | change |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| parameters | 1,000,000 | 600,000 | -40% |\n"
        "| megabytes | 4.0 | 2.4 | -40% |\n\n"
        "## Use\n\n"
        "The layers have different sizes, or sizes that the stock config cannot express. `import hf_slim` "
        "(`pip install hf-slim`), then load it as any other model.\n\n"
        "```python\n"
        "import hf_slim  # lets transformers build the slim shape\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        'model = AutoModelForSequenceClassification.from_pretrained("me/slim-x")\n'
        "```\n\n"
        f"{REMOTE_CODE_NOTE}\n"
        "## Sizes\n\n"
        "Units kept in every structure: intermediate channels of a feed-forward network (ffn), attention heads or "
        "key-value\ngroups of an attention module (mha).\n\n"
        "| structure | kind | before | after |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| `layer.0.output` | ffn | 1536 | 320 |\n"
        "| `layer.0.attention` | mha | 12 | 9 |\n\n"
        "## Evaluation\n\n"
        "| metric | value |\n"
        "| --- | ---: |\n"
        "| eval_loss | 0.5000 |\n"
        "| eval_pearson | 0.3333 |\n"
        "| eval_spearman | nan |"
    )


def test_a_stock_model_of_no_repository():
    text = _make("llama", base_model="", metrics={}).text
    assert "\nA `LlamaForCausalLM` with 60% of its parameters" in text
    assert "## Use\n\nThe config expresses the sizes by itself: this is a stock model, and nothing needs" in text
    assert "import hf_slim" not in text and "trust_remote_code" not in text and "## Evaluation" not in text


def test_a_folder_is_no_base_model(tmp_path):
    assert _make(base_model=str(tmp_path)).data.base_model is None


def test_part_of_another_card():
    text = _make(record=RECORD, title="Slimmed with hf_slim").text.strip()
    assert text.startswith("# Slimmed with hf_slim\n\nA `BertForSequenceClassification` with") and "```" not in text


def test_metadata_of_another_card_stay(tmp_path):
    head = "license: mit\nmodel-index:\n- name: theirs\n  results: []\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\n# Theirs\n")
    write_model_card(build("bert"), REPORT, tmp_path, "slim-x", False, METRICS)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"---\n{head}tags:\n- hf_slim\n- pruning\n---\n# Theirs\n\n# Slimmed with hf_slim\n")
    assert "| eval_loss | 0.5000 |" in text


def test_renaming_changes_the_line_that_loads(tmp_path):
    path = tmp_path / "README.md"
    _make(record=RECORD).save(path)
    before = path.read_text()
    rename_in_card(path, "me/slim-x", "me/slim-x")
    assert path.read_text() == before
    rename_in_card(path, "me/slim-x", "you/slim-x")
    assert path.read_text() == before.replace('.from_pretrained("me/slim-x")', '.from_pretrained("you/slim-x")')
    assert list(tmp_path.iterdir()) == [path]
