"""The model card: its metadata, its tables, and the cards of others."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import datasets
import pytest
from conftest import build
from huggingface_hub import ModelCard

from hf_slim import SlimConfig
from hf_slim.saving import model_card
from hf_slim.saving.card_facts import CardFacts, Provenance, find_card_facts, find_settings
from hf_slim.saving.layer_bars import StructureSize
from hf_slim.saving.model_card import make_card_data, make_model_card, rename_in_card, write_model_card
from hf_slim.saving.own_repository import find_install_command
from hf_slim.saving.report import SlimReport
from hf_slim.saving.training_data import DataName, find_data_name, find_data_names

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
    "but\ngive the model its sizes.\n\n"
    "```python\n"
    "from transformers import AutoModelForSequenceClassification\n\n"
    'model = AutoModelForSequenceClassification.from_pretrained("me/slim-x", trust_remote_code=True)\n'
    "```\n"
)


def _find_facts(
    family="bert", record=None, base_model="", metrics=METRICS, has_remote_code=False, **more
) -> CardFacts:
    model = build(family)
    model.config.name_or_path = base_model
    if record:
        model.config.hf_slim = record
    return find_card_facts(model, Provenance(metrics, **more), has_remote_code=has_remote_code)


def _make(*arguments, title=None, report=REPORT, before=None, **keywords) -> ModelCard:
    facts = replace(_find_facts(*arguments, **keywords), metrics_before=before or {})
    return make_model_card(facts, report, repo_id="me/slim-x", title=title)


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
    assert _make(metrics=metrics).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["hf_slim", "pruning"],
    }


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "text-generation"), ("t5", "text2text-generation"), ("roberta", "fill-mask"), ("vit", None)],
)
def test_the_task_is_that_of_the_class(family, task):
    (result, *_) = _make(family).data.eval_results
    assert result.task_type == (task or "image-classification")


def test_a_class_without_a_task():
    model = build("bert").bert
    facts = find_card_facts(model, Provenance({"eval_loss": 1}), has_remote_code=False)
    card = make_model_card(facts, REPORT, repo_id="x")
    assert card.data.eval_results[0].task_type == "other"


def test_the_whole_text():
    card = _make(record=RECORD, base_model="google/bert", has_remote_code=True)
    assert card.data.base_model == "google/bert"
    assert card.text.strip() == (
        "# slim-x\n\n"
        "[google/bert](https://huggingface.co/google/bert) slimmed to 60% of the parameters of the dense model: "
        "intermediate channels and attention heads were removed physically with hf_slim.\n\n"
        "|  | before | after | change |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| parameters | 1,000,000 | 600,000 | -40% |\n"
        "| megabytes | 4.0 | 2.4 | -40% |\n\n"
        "![What each layer keeps](hf_slim_layers.svg)\n\n"
        "## Use\n\n"
        "The layers have different sizes, or sizes that the stock config cannot express. `import hf_slim`, then load "
        "it as any other model. hf_slim is installed from its repository, in a clone of it: `pip install .`.\n\n"
        "```python\n"
        "import hf_slim  # lets transformers build the slim shape\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        'model = AutoModelForSequenceClassification.from_pretrained("me/slim-x")\n'
        "```\n\n"
        f"{REMOTE_CODE_NOTE}\n"
        "## Sizes\n\n"
        "Units kept in every structure: intermediate channels of a feed-forward network (ffn), attention heads or "
        "key-value\ngroups of an attention module (mha).\n\n"
        "<details><summary>2 structures</summary>\n\n"
        "| structure | kind | before | after |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| `layer.0.output` | ffn | 1536 | 320 |\n"
        "| `layer.0.attention` | mha | 12 | 9 |\n\n"
        "</details>\n\n"
        "## Evaluation\n\n"
        "| metric | value |\n"
        "| --- | ---: |\n"
        "| eval_loss | 0.5000 |\n"
        "| eval_pearson | 0.3333 |\n"
        "| eval_spearman | nan |"
    )


def test_what_was_counted_timed_and_evaluated_on_both_stands_side_by_side():
    costs = {"flops_before": 22_300_000_000, "flops_after": 11_150_000_000, "machine": "a CPU, 2 threads"}
    report = replace(REPORT, **costs, milliseconds_before=181.254, milliseconds_after=90.627)
    text = _make(report=report, before={"eval_loss": 0.25, "eval_recall": 0.1}).text
    assert (
        "| megabytes | 4.0 | 2.4 | -40% |\n"
        "| GFLOPs | 22.3 | 11.2 | -50% |\n"
        "| latency (ms) | 181.25 | 90.63 | -50% |\n"
        "| eval_loss | 0.2500 | 0.5000 |  |\n\n"
        "One forward pass on one example (of a text 128 tokens, or half as many as the model has positions, "
        "if that is less), timed in turn on a CPU, 2 threads.\n\n!["
    ) in text
    counted = _make(report=replace(report, milliseconds_before=None, milliseconds_after=None, machine="")).text
    assert "\n\nOne forward pass on one example (of a text " in counted and "if that is less).\n\n![" in counted
    assert "latency" not in counted


def test_names_and_numbers_that_are_markup_or_no_number(tmp_path):
    """The tables have as many cells as their heads, and the metadata are what was given."""
    odd = "eval_a|b\n---\n[c](x) <d> `e`"
    metrics = {odd: 0.5, "eval_none": float("nan"), "eval_inf": float("-inf")}
    data = DataName("me/odd", "one | two\n---\nthree", "x: [y")
    report = replace(REPORT, structures=(StructureSize("a|`b`\nc", "ffn", 2, 1),), missing="It <has> a | and\n*none*.")
    facts = replace(
        _find_facts(metrics=metrics, datasets=(data,), evaluated_on=data, settings={"a|b": "`c`\n|"}),
        metrics_before=metrics,
    )
    write_model_card(facts, report, tmp_path, "me/slim-x")
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "a|b --- [c](x) <d> `e`", "value": 0.5}]
    assert (result["dataset"]["config"], result["dataset"]["split"]) == ("one | two\n---\nthree", "x: [y")
    shown = r"eval_a\|b --- \[c\](x) &lt;d&gt; \`e\`"
    for line in (
        f"| {shown} | 0.5000 | 0.5000 |  |",
        "| eval_none | nan | nan |  |",
        f"| {shown} | 0.5000 |",
        "| eval_inf | -inf |",
        r'| `a\|b` | `` "`c`\n\|" `` |',
        r"| `` a\|`b` c `` | ffn | 2 | 1 |",
        r"It &lt;has&gt; a \| and \*none\*.",
    ):
        assert f"\n{line}\n" in card.text, line


def test_what_is_no_number_goes_through_json():
    facts = _find_facts(metrics={"eval_a": float("nan"), "eval_b": 1})
    facts = replace(facts, metrics_before={"eval_a": float("inf")})
    stored = json.loads(json.dumps(facts.to_dict(), allow_nan=False))
    assert stored["provenance"]["metrics"] == {"eval_a": "nan", "eval_b": 1}
    found = CardFacts.from_dict(stored)
    assert str(found) == str(facts)  # a NaN is not equal to itself


def test_the_settings_are_those_that_were_given():
    config = SlimConfig(ffn2_sparsity=0.5, slim_exclude=["layer.0|1"], slim_round_to=32)
    settings = find_settings(asdict(config))
    assert settings == {"ffn2_sparsity": 0.5, "slim_exclude": ["layer.0|1"]}
    assert (
        "## Settings of the slimming\n\n| argument | value |\n| --- | --- |\n"
        '| `ffn2_sparsity` | `0.5` |\n| `slim_exclude` | `["layer.0\\|1"]` |\n\n## Sizes'
    ) in _make(settings=settings).text
    assert find_settings([{"op_names": ["a"]}]) == {"entry 0": {"op_names": ["a"]}}


def test_the_hub_shows_where_the_model_comes_from():
    """A pruned model is none of adapter, merge and quantized."""
    data = DataName("nyu-mll/glue", "mrpc", "validation")
    facts = _find_facts(
        base_model="google/bert",
        metrics={"eval_f1": 0.9},
        datasets=(DataName("nyu-mll/glue", "mrpc", "train"), DataName("nyu-mll/glue", "rte", "train")),
        evaluated_on=data,
    )
    metadata = make_card_data(facts, "slim-x").to_dict()
    (index,) = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "base_model": "google/bert",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-classification",
        "datasets": ["nyu-mll/glue"],
        "tags": ["hf_slim", "pruning"],
    }
    (result,) = index["results"]
    source = {"name": "nyu-mll/glue", "type": "nyu-mll/glue", "config": "mrpc", "split": "validation"}
    assert result["dataset"] == source and result["metrics"] == [{"type": "f1", "value": 0.9}]


def _dataset(source=None, config="default", split=None):
    data = datasets.Dataset.from_list([{"a": 1}], split=split)
    data.info.download_checksums = {source: {}} if source else None
    data.info.config_name = config
    return data.map(lambda row: row)


def test_data_sets_of_the_hub_are_named_and_no_others():
    glue = _dataset("hf://datasets/nyu-mll/glue@0a1b/mrpc/train.parquet", "mrpc", "train")
    assert find_data_name(glue) == ("nyu-mll/glue", "mrpc", "train")
    assert find_data_name(_dataset("hf://datasets/imdb@main/x.parquet")) == ("imdb", None, None)
    unknown = (_dataset("/home/me/secret.csv"), _dataset(), [{"a": 1}], None)
    assert [find_data_name(data) for data in unknown] == [None] * 4
    assert find_data_names({"one": glue, "two": glue, "mine": _dataset()}) == [("nyu-mll/glue", "mrpc", "train")]


def test_the_license_is_that_of_the_base_models_card(tmp_path):
    head = "license: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: en\n"
    expected = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text(f"---\n{head}---\n# Base\n")
    facts = _find_facts(base_model=str(tmp_path), metrics={})
    assert facts.license == expected and facts.base_model is None
    assert expected.items() <= make_card_data(facts, "x").to_dict().items()
    for text in ("# No metadata\n", "---\nlanguage: en\n---\n", "---\n[\n---\n", "---\nlicense: [a]\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert _find_facts(base_model=str(tmp_path)).license == {}


def test_without_a_network_there_is_no_license():
    assert _find_facts(base_model="google/bert").license == {}


def test_hf_slim_is_installed_from_where_it_is_known_to_be(monkeypatch):
    """Never by a name that anybody could take."""
    noted = {"url": "https://example.org/slim.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}}
    for content, command in (
        (None, "pip install ."),
        (json.dumps({"url": "file:///work", "dir_info": {}}), "pip install ."),
        (json.dumps(noted | {"url": "ssh://git@example.org/slim"}), "pip install ."),
        (json.dumps(noted), 'pip install "git+https://example.org/slim.git@0a1b"'),
    ):
        distribution = SimpleNamespace(read_text={"direct_url.json": content}.get)
        monkeypatch.setattr("importlib.metadata.distribution", {"hf-slim": distribution}.get)
        assert find_install_command() == command
    assert 'hf_slim is installed from its repository: `pip install "git+https://' in _make(record=RECORD).text
    monkeypatch.setattr("hf_slim.saving.own_repository.REPOSITORY", "https://example.org/other")
    assert find_install_command() == 'pip install "git+https://example.org/other"'
    monkeypatch.setattr(model_card, "REPOSITORY", "https://example.org/other")
    assert "physically with [hf_slim](https://example.org/other).\n" in _make().text


def test_a_stock_model_of_no_repository():
    text = _make("llama", base_model="", metrics={}).text
    assert "\nA `LlamaForCausalLM` slimmed to 60% of the parameters of the dense model" in text
    assert "## Use\n\nThe config expresses the sizes by itself: this is a stock model, and nothing needs" in text
    assert '\nmodel = AutoModelForCausalLM.from_pretrained("me/slim-x")\n' in text
    assert "import hf_slim" not in text and "trust_remote_code" not in text and "## Evaluation" not in text


def test_a_folder_is_no_base_model(tmp_path):
    assert _make(base_model=str(tmp_path)).data.base_model is None


def test_part_of_another_card():
    text = _make(record=RECORD, title="Slimmed with hf_slim").text.strip()
    assert (
        text.startswith("# Slimmed with hf_slim\n\nA `BertForSequenceClassification` slimmed to") and "```" not in text
    )


def test_metadata_of_another_card_stay(tmp_path):
    head = "license: mit\nmodel-index:\n- name: theirs\n  results: []\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\n# Theirs\n")
    for _ in range(2):  # what is ours is written again, and what is theirs stays
        assert write_model_card(_find_facts(), REPORT, tmp_path, "slim-x") == tmp_path / "README.md"
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"---\n{head}tags:\n- hf_slim\n- pruning\n---\n# Theirs\n\n# Slimmed with hf_slim\n")
    assert text.count("| eval_loss | 0.5000 |") == 1
    assert (tmp_path / "hf_slim_layers.svg").read_text().startswith("<svg ")


def test_fields_that_were_added_to_our_metadata_stay(tmp_path):
    """Those of another model do not."""
    path = tmp_path / "README.md"
    write_model_card(_find_facts(base_model="google/bert"), REPORT, tmp_path, "slim-x")
    added = path.read_text().replace("---\n", "---\nlicense: mit\nlanguage: en\n", 1)
    path.write_text(added + "\nmine\n")
    (tmp_path / "new").mkdir()
    write_model_card(_find_facts(metrics={}), REPORT, tmp_path / "new", "slim-x", path)
    assert ModelCard.load(tmp_path / "new" / "README.md").data.to_dict() == {
        "library_name": "transformers",
        "license": "mit",
        "language": "en",
        "pipeline_tag": "text-classification",
        "tags": ["hf_slim", "pruning"],
    }


def test_renaming_changes_the_line_that_loads(tmp_path):
    path = tmp_path / "README.md"
    _make(record=RECORD, has_remote_code=True).save(path)
    before = path.read_text()
    rename_in_card(path, "me/slim-x", "me/slim-x")
    assert path.read_text() == before
    rename_in_card(path, "me/slim-x", "you/slim-x")
    assert before.count("me/slim-x") == 2 and path.read_text() == before.replace("me/slim-x", "you/slim-x")
    rename_in_card(path, "you/slim-x", "you/other")
    assert before.count("slim-x") == 4 and path.read_text() == before.replace("me/slim-x", "you/other").replace(
        "slim-x", "other"
    )
    assert list(tmp_path.iterdir()) == [path]
