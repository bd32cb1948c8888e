"""save_slimmed: the folder, the checks, the card, faults, and the upload to a loopback Hub."""

import copy
import functools
import json
import re

import pytest
import torch
import transformers
from conftest import STACK, build, half_masks, logits, make_batch
from huggingface_hub import ModelCard
from sparse_models import masked
from trainers import make_trainer
from transformers import AutoModelForSequenceClassification, Trainer

from hf_slim import FfnLayout, Fused, MhaLayout, find_structures, model_slim, register_layout, save_slimmed
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.output_comparison import VerificationError
from hf_slim.saving.report import StructureSize
from hf_slim.structures import attention


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, model):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_report_and_files(tmp_path):
    model = masked()
    before, config = state(model), model.config.to_dict()
    report = save_slimmed(model, tmp_path / "slim")
    assert (report.parameters_before, report.parameters_after) == (37890, 37890 - 2 * (32 * 65 + 2 * 1048))
    assert report.bytes_before - report.bytes_after == 4 * (report.parameters_before - report.parameters_after)
    assert report.structures[:2] == (
        StructureSize("bert.encoder.layer.0.attention.output.dense", "mha", 4, 2),
        StructureSize("bert.encoder.layer.0.output.dense", "ffn", 64, 32),
    )
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {
        *("config.json", "model.safetensors", "modeling_hf_slim.py", "README.md"),
        *("hf_slim_layers.svg", "slim_report.json"),
    }
    assert same(before, model) and model.config.to_dict() == config
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_inplace_slims_the_caller_too(tmp_path):
    model = masked()
    report = save_slimmed(model, tmp_path / "slim", inplace=True)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")
    assert same(state(loaded), model)


def test_training_mode_and_gradients_are_left(tmp_path):
    model = masked().train()
    model(**make_batch(model)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    save_slimmed(model, tmp_path / "slim")
    assert model.training and all(p.grad is gradients[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "use_cpu": True}])
def test_trainer(settings, tmp_path):
    """The slim model is one of its own: training the old one further does not touch it."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    trainer = make_trainer(build("bert"), tmp_path / "out", eval_strategy="epoch", num_train_epochs=1, **settings)
    trainer.processing_class = transformers.BertTokenizer(str(vocabulary))
    trainer.train()
    report = save_slimmed(trainer, tmp_path / "slim")
    assert report.parameters_after == 37890 - 2 * (32 * 65 + 2 * 1048)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").eval()
    batch = make_batch(loaded)
    wanted = logits(trainer.model.eval(), batch)
    torch.testing.assert_close(logits(loaded, batch), wanted, atol=0.05 if settings else 1e-5, rtol=0)
    assert (tmp_path / "slim" / "tokenizer.json").exists()
    assert trainer.evaluate()["eval_loss"] > 0


def test_slim_round_to_of_the_trainer_holds(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path / "out", slim_round_to=4, ffn2_sparsity=0.8, slim_scope="local")
    trainer.train()
    report = save_slimmed(trainer, tmp_path / "slim")
    assert [s.after for s in report.structures if s.kind == "ffn"] == [16, 16]


@pytest.mark.parametrize("live", [True, False])
def test_fine_tuning_a_slim_model_again(live, tmp_path):
    save_slimmed(masked(), tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    trainer = make_trainer(model, tmp_path / "out", slim_round_to=4, slim_live=live)
    trainer.train()
    report = save_slimmed(trainer, tmp_path / "second")
    assert sum(s.before for s in report.structures if s.kind == "ffn") == 128  # of the dense model
    assert sum(s.after for s in report.structures if s.kind == "ffn") == 32
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(logits(again, make_batch(again)), logits(model.eval(), make_batch(model)))


def test_slimming_a_model_from_remote_code_again(tmp_path):
    save_slimmed(masked(), tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first", trust_remote_code=True).eval()
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    report = save_slimmed(model, tmp_path / "second")
    assert [s.after for s in report.structures] == [1, 32, 1, 32]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second", trust_remote_code=True)
    torch.testing.assert_close(logits(again, make_batch(again)), logits(model, make_batch(model)))


def test_a_model_without_zeros_is_saved_as_it_is(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_slim.saving.save.logger.warning", messages.append)
    model = build("bert")
    report = save_slimmed(model, tmp_path)
    assert report.parameters_before == report.parameters_after
    assert "no unit of the model is zero" in messages[0]
    assert "slim" not in json.loads((tmp_path / "config.json").read_text())


def test_model_card(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path / "out", eval_strategy="steps", eval_steps=12)
    trainer.train()
    save_slimmed(trainer, tmp_path / "my-slim-bert")
    card = ModelCard.load(tmp_path / "my-slim-bert" / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["hf_slim", "pruning"]
    assert "| parameters | 37,890 | 29,538 | -22% |" in card.text
    assert "import hf_slim" in card.text and "trust_remote_code=True" in card.text
    assert 'AutoModelForSequenceClassification.from_pretrained("my-slim-bert")' in card.text
    assert "| `bert.encoder.layer.0.attention.output.dense` | mha | 4 |" in card.text
    assert "| eval_loss |" in card.text and "runtime" not in card.text


def test_the_card_of_somebody_else_stays(tmp_path):
    """What the folder's README.md said is at its head, however often the model is saved."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My project\n\nNotes.\n")
    for _ in range(2):
        save_slimmed(masked(), tmp_path)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.to_dict() == {"license": "mit", "tags": ["mine", "hf_slim", "pruning"]}
    assert card.text.strip().startswith("# My project\n\nNotes.\n\n# Slimmed with hf_slim\n\nA `BertFor")
    assert text.count("| parameters | 37,890 | 29,538 | -22% |") == 1


def test_our_own_card_is_replaced(tmp_path):
    save_slimmed(build("bert"), tmp_path / "slim")
    save_slimmed(masked(), tmp_path / "slim")
    text = (tmp_path / "slim" / "README.md").read_text()
    assert "| parameters | 37,890 | 29,538 | -22% |" in text and text.count("## Sizes") == 1


@pytest.mark.parametrize("head", ["- a", ": [b"])
def test_a_card_that_cannot_be_read(head, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Mine\n")
    with pytest.raises(
        ValueError, match="^The metadata at the head of the README.md in the folder cannot be read, so"
    ):
        save_slimmed(masked(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_model_card_of_a_stock_model(tmp_path):
    save_slimmed(masked("llama"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "this is a stock model" in text
    assert "import hf_slim" not in text and "trust_remote_code" not in text


def test_a_batch_of_the_user_verifies(tmp_path):
    model = masked()
    save_slimmed(model, tmp_path / "a", verify=make_batch(model))
    save_slimmed(model, tmp_path / "b", verify=False)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_wrong_layout_is_refused_and_nothing_written(tmp_path, monkeypatch, own_layouts):
    """A row that takes the softmax over channels for an elementwise activation."""

    class Softmaxed(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.inner = torch.nn.Linear(config.hidden_size, config.intermediate_size)
            self.outer = torch.nn.Linear(config.intermediate_size, config.hidden_size)

        def forward(self, states):
            return self.outer(self.inner(states).softmax(-1))

    register_layout(FfnLayout(("inner",), "outer"))
    monkeypatch.setattr("hf_slim.structures.discovery.find_strange", lambda model, path, structure: None)

    class Odd(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].mlp = Softmaxed(config)

    model = Odd(build("llama").config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    with pytest.raises(VerificationError, match="logits differs from the masked model's by .* Nothing was saved"):
        save_slimmed(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_refused(tmp_path):
    model = masked()
    with torch.no_grad():
        model.classifier.weight[0] = float("nan")
    with pytest.raises(VerificationError, match="logits holds NaN or nothing but infinity"):
        save_slimmed(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"private": True}, ValueError, "private can only be used with push_to_hub=True"),
        ({"push_to_hub": True, "colour": 1}, TypeError, "unexpected keyword argument 'colour'; for the Hub it takes"),
        (
            {"push_to_hub": True, "create_pr": True, "revision": "v2"},
            ValueError,
            "create_pr=True opens a pull request against the main branch, so revision='v2' cannot be used with it",
        ),
        ({"push_to_hub": True, "repo_id": "a/b/c"}, ValueError, "Repo id must be in the form .*a/b/c"),
    ],
)
def test_wrong_keywords_are_refused(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_slimmed(masked(), tmp_path / "slim", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_other_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="takes a Trainer or a PreTrainedModel, got Linear"):
        save_slimmed(torch.nn.Linear(2, 2), tmp_path / "slim")


def test_a_compiled_model(tmp_path):
    assert save_slimmed(torch.compile(masked()), tmp_path / "slim").parameters_after == 29538
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")


def test_a_slimmed_model_that_cannot_run_is_refused(tmp_path, monkeypatch):
    """GPT-2 splits its fused projection by an attribute, which discovery is made to overlook."""
    monkeypatch.setattr(attention, "HEAD_WIDTHS", ())
    monkeypatch.setattr(attention, "_ABOUT_HEADS", re.compile("overlooked"))
    model = build("gpt2")
    structures = find_structures(model).of_kind("mha")
    zero_units(model, structures, half_masks(structures))
    with pytest.raises(VerificationError, match="The masked model runs, but the slimmed one does not"):
        save_slimmed(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_layout_is_found(tmp_path, own_layouts):
    """GPT-NeoX holds query, key and value of one head after the other; the planted row says all queries first."""
    register_layout(MhaLayout((Fused("query_key_value"),), ("dense",)))
    fields = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**STACK, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    structures = find_structures(model).of_kind("mha")
    assert len(structures) == 2
    masks = half_masks(structures)
    for structure in structures:  # the output projection alone, as a user might do it: the heads really are unused
        for member in structure.outputs:
            weight = model.get_parameter(member.tensor)
            weight.data[:, member.index[~masks[structure.name]].flatten()] = 0
    with pytest.raises(VerificationError, match="The slimmed model's logits differs from the masked model's by"):
        save_slimmed(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_draws_random_numbers(tmp_path):
    """ViTMAE masks random patches even in evaluation."""
    fields = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64}
    config = transformers.ViTMAEConfig(**STACK, **fields, decoder_num_hidden_layers=1, image_size=16, patch_size=4)
    model = transformers.ViTMAEForPreTraining(config).eval()
    structures = find_structures(model).of_kind("ffn")
    zero_units(model, structures, half_masks(structures))
    assert {s.after for s in save_slimmed(model, tmp_path / "slim").structures if s.kind == "ffn"} == {32}


def test_a_forward_pass_that_runs_the_model_it_was_made_for_is_not_copied(tmp_path):
    """As TRL's fused head: its copy would run the trained model, with dropout."""
    model = masked("gpt2", attn_pdrop=0.5).train()
    run = model.forward
    model.forward = functools.wraps(run)(lambda *args, **kwargs: run(*args, **kwargs))
    report = save_slimmed(model, tmp_path / "slim")
    assert report.parameters_after < report.parameters_before
    assert model.training and "forward" in vars(model)


def test_custom_classes_load_by_themselves_and_their_base_by_remote_code(tmp_path):
    class Mine(transformers.BertForSequenceClassification):
        pass

    model = Mine(build("bert").config).eval()
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    save_slimmed(model, tmp_path)
    assert "trust_remote_code" not in (tmp_path / "README.md").read_text()
    base = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert base.num_parameters() == model_slim(copy.deepcopy(model)).bert.num_parameters()
    batch = {"input_ids": make_batch(model)["input_ids"]}
    assert torch.equal(logits(Mine.from_pretrained(tmp_path), batch), logits(model_slim(model), batch))


def test_saving_with_a_plain_trainer(tmp_path):
    trainer = Trainer(masked(), transformers.TrainingArguments(tmp_path / "out", report_to="none"))
    assert [s.after for s in save_slimmed(trainer, tmp_path / "slim").structures] == [2, 32, 2, 32]
