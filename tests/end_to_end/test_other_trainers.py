"""The same callback in other trainers, and modules that hold transformers models."""

import shutil
import textwrap

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from conftest import build, logits, make_batch
from huggingface_hub import ModelCard
from trainers import (
    HALF,
    RUN,
    make_encoder,
    make_encoder_trainer,
    make_sft_trainer,
    sentence_transformers,
    slim_callback,
    watch,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
)

from hf_slim import (
    SlimSeq2SeqTrainingArguments,
    SlimTrainerCallback,
    find_structures,
    save_slimmed,
)
from hf_slim.cli.tokenizer import make_byte_tokenizer


def plain(trainer):
    """The trainer's model in evaluation mode, without the autocast that accelerate wraps around its forward pass."""
    return extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False).eval()


def check_target(trainer, watcher, share=0.5):
    """The masks keep what they should, nothing that was dropped has moved, and what has left the model is proven."""
    callback = slim_callback(trainer)
    assert callback.slimming.unproven == set()
    assert callback.sparsities() == {"ffn2_sparsity": share, "mha_sparsity": share}
    assert (watcher.steps, watcher.moved, watcher.returned) == (trainer.state.max_steps, 0, 0)


# ------------------------------------------------------------------------------------------------ Seq2SeqTrainer


def test_seq2seq_trainer(tmp_path):
    model = build("t5", spread=0.1)
    args = SlimSeq2SeqTrainingArguments(
        tmp_path / "out", predict_with_generate=True, generation_max_length=6, eval_strategy="epoch", **RUN, **HALF
    )
    data = [{"input_ids": row, "labels": row.flip(0)} for row in torch.randint(5, 99, (32, 7))]
    tokenizer = make_byte_tokenizer()
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"generated": len(found.predictions)},
        callbacks=[SlimTrainerCallback()],
    )
    watcher = watch(trainer)
    trainer.train()
    check_target(trainer, watcher)
    assert trainer.evaluate()["eval_generated"] == 4
    report = save_slimmed(trainer, tmp_path / "slim")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "slim")
    assert loaded.num_parameters() < report.parameters_before
    batch = make_batch(model)
    torch.testing.assert_close(logits(loaded, batch), logits(model.eval(), batch), atol=1e-5, rtol=1e-4)
    ids = batch["input_ids"]
    assert torch.equal(loaded.generate(ids, max_length=6), model.generate(ids, max_length=6))


# ---------------------------------------------------------------------------------------------------- SFTTrainer


@pytest.mark.parametrize("in_arguments", [True, False], ids=["mixin", "beside"])
def test_sft_trainer(in_arguments, tmp_path):
    trainer = make_sft_trainer(tmp_path / "out", in_arguments=in_arguments)
    watcher = watch(trainer)
    trainer.train()
    check_target(trainer, watcher)
    report = save_slimmed(trainer, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert loaded.num_parameters() < report.parameters_before
    batch = make_batch(loaded)
    torch.testing.assert_close(logits(loaded, batch), logits(plain(trainer), batch), atol=1e-5, rtol=1e-4)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "slim")("cat")["input_ids"]


# --------------------------------------------------------------------------------------- SentenceTransformerTrainer


SENTENCES = ["the cat sees the dog", "a child likes not the song", "river"]


@pytest.fixture(scope="module")
def trained_encoder(tmp_path_factory):
    """A trained SentenceTransformer with zero units, and the folder in which it was saved slim."""
    folder = tmp_path_factory.mktemp("encoder")
    trainer = make_encoder_trainer(make_encoder(folder / "base"), folder / "out")
    watcher = watch(trainer)
    trainer.train()
    check_target(trainer, watcher)
    report = save_slimmed(trainer, folder / "slim")
    return trainer, report, folder / "slim"


def test_sentence_transformer_trainer(trained_encoder):
    st = sentence_transformers()
    trainer, report, folder = trained_encoder
    assert {s.name: s.after for s in report.structures} == {
        name: int(mask.sum()) for name, mask in slim_callback(trainer).masks.items()
    }
    slim = st.SentenceTransformer(str(folder), device="cpu")
    assert sum(p.numel() for p in slim.parameters()) == report.parameters_after < report.parameters_before
    assert [type(module).__name__ for module in slim] == ["Transformer", "Pooling", "Normalize"]
    expected = trainer.model.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(slim.encode(SENTENCES, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
    assert AutoModel.from_pretrained(folder).num_parameters() == report.parameters_after
    assert sum(p.numel() for p in trainer.model.parameters()) == report.parameters_after
    trainer.model.train()
    record = trainer.model[0].model.config.hf_slim
    assert {numbers["num_attention_heads"] for numbers in record["attributes"].values()} == {2}
    assert {shape[0] for name, shape in record["shapes"].items() if ".intermediate." in name} == {32}


def test_sentence_transformer_without_the_package(trained_encoder, warm_python, tmp_path):
    """Where hf_slim is not imported, the remote-code file in the folder gives the shape."""
    trainer, report, folder = trained_encoder
    torch.save(trainer.model.encode(SENTENCES, convert_to_tensor=True), tmp_path / "expected.pt")
    script = textwrap.dedent(
        f"""
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers import AutoModel
        encoder = SentenceTransformer({str(folder)!r}, trust_remote_code=True, device="cpu")
        assert sum(p.numel() for p in encoder.parameters()) == {report.parameters_after}
        found = encoder.encode({SENTENCES!r}, convert_to_tensor=True)
        torch.testing.assert_close(found, torch.load({str(tmp_path / "expected.pt")!r}), atol=1e-5, rtol=0)
        AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
        """
    )
    done = warm_python.run(script, library=False, cwd=tmp_path)
    assert done.status == 0, done.stderr[-3000:]


def test_the_card_of_a_sentence_transformer_holds_both(trained_encoder):
    _, report, folder = trained_encoder
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    assert {"sentence-transformers", "hf_slim", "pruning"} <= set(card.data.tags)
    assert card.data.library_name == "sentence-transformers"
    assert "SentenceTransformer(" in card.text and "# Slimmed with hf_slim" in card.text
    assert f"{report.parameters_after:,}" in card.text and "trust_remote_code=True" in card.text


def test_a_sentence_transformer_is_saved_again_into_its_folder(trained_encoder, tmp_path):
    st = sentence_transformers()
    _, report, folder = trained_encoder
    shutil.copytree(folder, tmp_path / "slim")
    loaded = st.SentenceTransformer(str(tmp_path / "slim"), device="cpu")
    again = save_slimmed(loaded, tmp_path / "slim")
    assert again.parameters_after == report.parameters_after
    assert (tmp_path / "slim" / "README.md").read_text().count("# Slimmed with hf_slim") == 1
    reloaded = st.SentenceTransformer(str(tmp_path / "slim"), device="cpu").state_dict()
    assert all(torch.equal(value, reloaded[key]) for key, value in loaded.state_dict().items())


def test_cross_encoder(tmp_path):
    st = sentence_transformers()
    make_encoder(tmp_path / "base")
    model = st.CrossEncoder(str(tmp_path / "base"), num_labels=1, device="cpu")
    from hf_slim.compaction.zeros import zero_units

    structures = find_structures(model).structures
    masks = {s.name: torch.arange(s.units) < s.units // (2 if s.kind == "ffn" else 4) for s in structures}
    zero_units(model, structures, masks)
    report = save_slimmed(model, tmp_path / "slim")
    assert report.parameters_after < report.parameters_before
    asked = [("the cat", "a dog"), ("river", "song")]
    slim = st.CrossEncoder(str(tmp_path / "slim"), device="cpu")
    torch.testing.assert_close(
        torch.tensor(slim.predict(asked)), torch.tensor(model.predict(asked)), atol=1e-5, rtol=0
    )
