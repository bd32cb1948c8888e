"""SlimTrainer: a model learns from a teacher in any Trainer, and nothing else changes."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import build
from torch import nn
from trainers import (
    EVERY,
    HALF,
    RUN,
    WORDS,
    dropout_free,
    make_data,
    make_encoder,
    pairs,
    sentence_transformers,
    slim_callback,
    weights,
)
from transformers import (
    BertForSequenceClassification,
    BertModel,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_slim import (
    SlimArgumentsMixin,
    SlimConfig,
    SlimSeq2SeqTrainingArguments,
    SlimTrainer,
    SlimTrainerCallback,
    SlimTrainerMixin,
    SlimTrainingArguments,
    parse_auto_slim_config,
    save_slimmed,
)
from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.distillation.slim_trainer import TeacherCallback

ONLY = {**RUN, "max_steps": 3}


class Mixed(SlimTrainerMixin, Seq2SeqTrainer):
    """A Seq2SeqTrainer with a teacher."""


def make(model, folder, trainer_class=SlimTrainer, *, teacher_model=None, callbacks=(), data=None, **settings):
    args = SlimTrainingArguments(folder, **{**RUN, **settings})
    data = make_data(model) if data is None else data
    given = {} if teacher_model is None else {"teacher_model": teacher_model}
    return trainer_class(model, args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks], **given)


def entries(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def other(model, spread=0.3):
    """A model of the same kind with other weights."""
    torch.manual_seed(7)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return changed


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "bart", "t5", "vit"])
def test_a_copy_of_the_model_says_the_same_at_the_first_step(family, tmp_path):
    trainer = make(
        dropout_free(family) if family != "llama" else build(family, spread=0.1),
        tmp_path,
        **ONLY,
        slim_teacher="self",
        slim_hidden_weight=1.0,
    )
    trainer.train()
    tasks, distances = entries(trainer, "task_loss"), entries(trainer, "distill_loss")
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[-1] > 1e-5
    mean = [(task + distance) / 2 for task, distance in zip(tasks, distances, strict=True)]
    assert entries(trainer) == pytest.approx(mean, rel=1e-4)


def test_weight_0_trains_as_without_a_teacher(tmp_path):
    plain = make(dropout_free(), tmp_path, Trainer, **ONLY)
    plain.train()
    taught = make(dropout_free(), tmp_path, teacher_model=dropout_free(seed=3), slim_distill_weight=0, **ONLY)
    taught.train()
    expected = plain.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in taught.model.state_dict().items())


def test_the_loss_is_that_of_the_task_and_the_divergence_of_the_logits(tmp_path):
    model, teacher = dropout_free(), dropout_free(seed=3)
    data = make_data(model)[:4]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    trainer = make(
        model,
        tmp_path,
        teacher_model=teacher,
        data=data,
        **{**ONLY, "max_steps": 1},
        slim_distill_weight=0.3,
        slim_temperature=3.0,
    )
    with torch.no_grad():
        out, known = model(**batch), teacher.eval()(**batch).logits
    q, p = (out.logits / 3).log_softmax(-1), (known / 3).log_softmax(-1)
    divergence = 9 * (p.exp() * (p - q)).sum(-1).mean()
    trainer.train()
    assert entries(trainer, "task_loss") == [pytest.approx(out.loss.item(), rel=1e-5)]
    assert entries(trainer, "distill_loss") == [pytest.approx(divergence.item(), rel=1e-4)]
    assert entries(trainer) == [pytest.approx(0.7 * out.loss.item() + 0.3 * divergence.item(), rel=1e-4)]


def test_last_hidden_alone_is_twice_the_mean_squared_difference(tmp_path):
    model, teacher = dropout_free(), dropout_free(seed=3)
    data = make_data(model)[:4]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0] if name != "labels"}
    with torch.no_grad():
        states = [m.bert(**batch).last_hidden_state for m in (model, teacher)]
    square = (states[0] - states[1]).square().mean().item()
    trainer = make(
        model,
        tmp_path,
        teacher_model=teacher,
        data=data,
        **{**ONLY, "max_steps": 1},
        slim_distill_weight=1,
        slim_distill_from="last_hidden",
        slim_hidden_weight=2,
    )
    head = model.classifier.weight.clone()
    trainer.train()
    assert entries(trainer) == [pytest.approx(2 * square, rel=1e-4)]
    assert torch.equal(model.classifier.weight, head)  # the head gets no gradient


def test_a_regression_takes_the_squared_difference(tmp_path):
    model, teacher = (dropout_free_with(num_labels=1, seed=seed) for seed in (0, 3))
    data = [{**row, "labels": torch.tensor(0.5)} for row in make_data(dropout_free())[:4]]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0] if name != "labels"}
    with torch.no_grad():
        square = (model(**batch).logits - teacher(**batch).logits).square().mean().item()
    trainer = make(model, tmp_path, teacher_model=teacher, data=data, **{**ONLY, "max_steps": 1})
    trainer.train()
    assert entries(trainer, "distill_loss") == [pytest.approx(square, rel=1e-4)]


def dropout_free_with(seed=0, **changes):
    from trainers import NO_DROPOUT

    return build("bert", seed=seed, spread=0.1, **NO_DROPOUT["bert"], **changes)


def make_ragged(rows=16, seed=5):
    """Rows whose labels count at different numbers of positions."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(rows):
        ids = torch.randint(3, 99, (12,), generator=generator)
        mask = (torch.arange(12) < 3 + number % 9).long()
        labels = torch.where((mask == 1) & (torch.arange(12) >= number % 3), ids, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("settings", [{}, {"slim_hidden_weight": 1.0}], ids=["logits", "hidden"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])  # whose losses are divided by the items of all batches
def test_accumulated_batches_are_one_large_batch(family, settings, tmp_path):
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        model = dropout_free(family)
        trainer = make(
            model,
            tmp_path,
            teacher_model=other(dropout_free(family)),
            data=make_ragged(),
            **{
                **ONLY,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": steps,
                "optim": "sgd",
                "learning_rate": 0.1,
                "slim_distill_weight": 1,
                **settings,
            },
        )
        trainer.train()
        results.append((weights(model), entries(trainer), entries(trainer, "distill_loss")))
    (one, losses, distances), (two, other_losses, other_distances) = results
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert losses == pytest.approx(other_losses, rel=1e-4)
    assert distances == pytest.approx(other_distances, rel=1e-4)
    assert distances[0] > 0.01


def test_ignored_labels_do_not_count(tmp_path):
    model, teacher = dropout_free("opt"), other(dropout_free("opt"))
    data = make_ragged(4)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        q, p = ((m(**batch).logits[:, :-1] / 2).log_softmax(-1) for m in (model, teacher))
    mask = batch["labels"][:, 1:] != -100
    divergence = 4 * (p.exp() * (p - q)).sum(-1)[mask].mean().item()
    trainer = make(model, tmp_path, teacher_model=teacher, data=data, **{**ONLY, "max_steps": 1})
    trainer.train()
    assert entries(trainer, "distill_loss") == [pytest.approx(divergence, rel=1e-4)]


def test_evaluation_does_without_the_teacher(tmp_path):
    model = dropout_free()
    trainer = make(model, tmp_path, teacher_model=dropout_free(seed=3), eval_strategy="steps", eval_steps=1, **ONLY)
    calls = []
    trainer.teacher_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [False] * 3  # one for each training step
    plain = Trainer(model, TrainingArguments(tmp_path, **RUN), eval_dataset=make_data(model))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert len(calls) == 3


def test_the_teacher_stays_as_it_is_and_out_of_what_is_saved(tmp_path):
    teacher = dropout_free(seed=3).train()
    before, needs = weights(teacher), [p.requires_grad for p in teacher.parameters()]
    trainer = make(dropout_free(), tmp_path, teacher_model=teacher, **{**HALF, "slim_live": True})
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert [p.requires_grad for p in teacher.parameters()] == needs
    assert all(p.grad is None for p in teacher.parameters())
    assert "hf_slim" not in teacher.config.to_dict() and "hf_slim" in trainer.model.config.to_dict()
    report = save_slimmed(trainer, tmp_path / "slim")
    assert report.parameters_after == sum(p.numel() for p in trainer.model.parameters())
    trainer.save_model(tmp_path / "again")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in trainer.model.parameters())


@pytest.mark.parametrize("live", [False, True])
def test_a_callback_is_added_where_a_sparsity_is_asked_for(live, tmp_path):
    trainer = make(dropout_free(), tmp_path, slim_teacher="self", **{**HALF, "slim_live": live})
    trainer.train()
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert slim_callback(trainer).slimming.is_live == live
    own = SlimTrainerCallback()
    trainer = make(dropout_free(), tmp_path, callbacks=[own], slim_teacher="self", **HALF)
    assert slim_callback(trainer) is own
    assert not any(
        isinstance(c, SlimTrainerCallback) for c in make(dropout_free(), tmp_path).callback_handler.callbacks
    )


def test_a_callback_is_added_where_a_budget_is_asked_for(tmp_path):
    trainer = make(dropout_free(), tmp_path, slim_teacher="self", slim_target_params=0.9)
    assert any(isinstance(c, SlimTrainerCallback) for c in trainer.callback_handler.callbacks)


class Kill(TrainerCallback):
    """Ends a training right after a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("teacher", ["self", "folder"])
def test_a_resumed_training_is_the_one_that_was_not_interrupted(teacher, live, tmp_path):
    build("bert", seed=3, spread=0.1).save_pretrained(tmp_path / "teacher")
    name = "self" if teacher == "self" else str(tmp_path / "teacher")
    settings = {**HALF, "slim_live": live, "slim_teacher": name, "slim_hidden_weight": 1.0, **EVERY}
    whole = make(build("bert", spread=0.1), tmp_path / "whole", **settings)
    whole.train()
    killed = make(build("bert", spread=0.1), tmp_path / "killed", callbacks=[Kill(7)], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(build("bert", spread=0.1), tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    assert resumed.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.model.state_dict().items())
    assert entries(resumed) == entries(whole)
    assert entries(resumed, "distill_loss") == entries(whole, "distill_loss")
    # The same trainer goes on with the teacher that it has.
    shutil.rmtree(tmp_path / "killed" / "checkpoint-9")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-12")
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.model.state_dict().items())


def test_another_teacher_than_that_of_the_checkpoint_is_refused(tmp_path):
    settings = {**HALF, "slim_live": False, "slim_teacher": "self", **EVERY}
    make(dropout_free(), tmp_path, **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    from_checkpoint = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-9")
    for model in (dropout_free(seed=4), from_checkpoint):
        trainer = make(model, tmp_path, **settings)
        with pytest.raises(ValueError, match="checkpoint of step 9 was trained with another teacher"):
            trainer.train(resume_from_checkpoint=True)


def test_a_model_that_is_made_anew_is_the_teacher_of_its_training(tmp_path):
    args = SlimTrainingArguments(tmp_path, **ONLY, slim_teacher="self")
    data = make_data(dropout_free())
    seeds = iter((4, 5, 6))
    trainer = SlimTrainer(model_init=lambda: dropout_free(seed=next(seeds)), args=args, train_dataset=data)
    trainer.train()
    assert entries(trainer, "distill_loss")[0] == pytest.approx(0, abs=1e-5)
    expected = dropout_free(seed=5).state_dict()  # the first is made with the trainer
    assert all(torch.equal(t, expected[name]) for name, t in trainer.teacher_model.state_dict().items())


@pytest.mark.parametrize(
    "how", ["smoothing", "function", "half", "checkpointing", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_features_of_the_trainer_work(how, tmp_path):
    family = "gpt2" if how != "function" else "bert"
    model = dropout_free(family)
    teacher = other(dropout_free(family))
    settings = {
        "smoothing": {"label_smoothing_factor": 0.1},
        "half": {"bf16": True, "slim_teacher_dtype": "bfloat16"},
        "checkpointing": {"gradient_checkpointing": True, "slim_hidden_weight": 1.0},
        "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager", "slim_hidden_weight": 1.0},
        "function": {},
    }[how]
    reference = make(
        dropout_free(family),
        tmp_path,
        teacher_model=other(dropout_free(family)),
        slim_hidden_weight=settings.get("slim_hidden_weight", 0.0),
        **ONLY,
    )
    reference.train()
    args = SlimTrainingArguments(tmp_path, **{**ONLY, **settings})
    function = (
        (
            lambda outputs, labels, num_items_in_batch=None: (
                nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
            )
        )
        if how == "function"
        else None
    )
    trainer = SlimTrainer(
        model, args, train_dataset=make_data(model), teacher_model=teacher, compute_loss_func=function
    )
    trainer.train()
    tolerance = 0.2 if how == "half" else 1e-3
    assert entries(trainer, "distill_loss")[0] == pytest.approx(entries(reference, "distill_loss")[0], rel=tolerance)
    assert entries(trainer, "distill_loss")[0] > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(family, reentrant, tmp_path):
    results = []
    for on in (False, True):
        trainer = make(
            dropout_free(family),
            tmp_path,
            teacher_model=other(dropout_free(family)),
            slim_hidden_weight=1.0,
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            **ONLY,
        )
        trainer.train()
        results.append((entries(trainer), entries(trainer, "distill_loss"), entries(trainer, "grad_norm")))
    assert list(results[0]) == [pytest.approx(values, rel=1e-4) for values in results[1]]


def test_a_seq2seq_trainer_learns_too(tmp_path):
    model = dropout_free("t5")
    args = SlimSeq2SeqTrainingArguments(tmp_path, **{**RUN, **HALF}, slim_teacher="self")
    trainer = Mixed(model, args, train_dataset=make_data(model), eval_dataset=make_data(model))
    trainer.train()
    assert len(entries(trainer, "distill_loss")) == 12
    save_slimmed(trainer, tmp_path / "slim")


def make_sft(folder, *, peft_config=None, teacher_model=None, **settings):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'hf-slim[integrations]'")
    from datasets import Dataset

    @dataclass
    class Arguments(SlimArgumentsMixin, trl.SFTConfig):
        """SFTConfig with the slimming fields."""

    class Taught(SlimTrainerMixin, trl.SFTTrainer):
        """SFTTrainer with a teacher."""

    model = build("llama", spread=0.1, vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    data = Dataset.from_list([{"text": f"the {a} sees the {b}"} for a in WORDS[:6] for b in WORDS[:6]])
    return Taught(
        model,
        Arguments(str(folder), **{**RUN, "max_length": 32, **settings}),
        train_dataset=data,
        processing_class=make_byte_tokenizer(),
        peft_config=peft_config,
        teacher_model=teacher_model,
    )


def test_an_sft_trainer_learns_too(tmp_path):
    teacher = build("llama", seed=3, spread=0.1, vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    trainer = make_sft(tmp_path, teacher_model=teacher, slim_hidden_weight=1.0, **HALF)
    batch = next(iter(trainer.get_train_dataloader()))
    said = trainer.model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    known = teacher(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    assert said.shape == known.shape
    trainer.train()
    tasks, distances = entries(trainer, "task_loss"), entries(trainer, "distill_loss")
    assert len(distances) == 12 and distances[0] > 0.01
    assert entries(trainer)[0] == pytest.approx((tasks[0] + distances[0]) / 2, rel=1e-4)
    save_slimmed(trainer, tmp_path / "slim")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_fused_loss_of_trl_gives_the_divergence_of_the_logits(smoothing, tmp_path):
    teacher = build("llama", seed=3, spread=0.1, vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    trainer = make_sft(tmp_path, teacher_model=teacher, label_smoothing_factor=smoothing, **{**ONLY, "max_steps": 1})
    seen = []
    step = trainer.training_step

    def watch(model, inputs, num_items_in_batch=None):
        seen.append({key: value.clone() for key, value in inputs.items()})
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = watch
    model = copy.deepcopy(build("llama", spread=0.1, vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0))
    trainer.train()
    (batch,) = seen
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        q, p = ((m(**batch).logits[:, :-1].float() / 2).log_softmax(-1) for m in (model, teacher))
    divergence = 4 * (p.exp() * (p - q)).sum(-1)[labels != -100].mean().item()
    assert entries(trainer, "distill_loss") == [pytest.approx(divergence, rel=1e-3)]


def test_a_copy_of_a_patched_model_runs_its_own_weights(tmp_path):
    trainer = make_sft(
        tmp_path, slim_teacher="self", learning_rate=0.05, **{k: v for k, v in ONLY.items() if k != "learning_rate"}
    )
    trainer.train()
    distances = entries(trainer, "distill_loss")
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[-1] > 1e-3


def test_adapters_learn_from_the_model_without_them(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'hf-slim[integrations]'")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    build("llama", seed=3, spread=0.1, vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0).save_pretrained(
        tmp_path / "teacher"
    )
    for name in ("self", str(tmp_path / "teacher")):
        trainer = make_sft(tmp_path, peft_config=lora, slim_teacher=name, slim_criterion="magnitude", **HALF)
        trainer.train()
        distances = entries(trainer, "distill_loss")
        assert (distances[0] < 1e-5) == (name == "self")
        assert distances[-1] > 1e-6


def make_embedder(folder, loss=None, **settings):
    st = sentence_transformers()
    from sentence_transformers.sentence_transformer import losses

    @dataclass
    class Arguments(SlimArgumentsMixin, st.SentenceTransformerTrainingArguments):
        """SentenceTransformerTrainingArguments with the slimming fields."""

    class Taught(SlimTrainerMixin, st.SentenceTransformerTrainer):
        """SentenceTransformerTrainer with a teacher."""

    model = make_encoder(folder / "encoder", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return Taught(
        model,
        Arguments(str(folder), **{**RUN, **settings}),
        train_dataset=pairs() if loss is None else pairs().remove_columns("score"),
        loss=(getattr(losses, loss) if loss else losses.CosineSimilarityLoss)(model),
    )


@pytest.mark.parametrize(
    "settings", [{}, {"slim_hidden_weight": 1.0}, {"slim_distill_from": "last_hidden", "slim_hidden_weight": 2.0}]
)
def test_a_bi_encoder_learns_from_embeddings(settings, tmp_path):
    trainer = make_embedder(tmp_path, slim_teacher="self", **HALF, **settings)
    trainer.train()
    distances = entries(trainer, "distill_loss")
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[-1] > 1e-5
    save_slimmed(trainer, tmp_path / "slim")
    assert trainer.teacher_model.model_card_data is trainer.model.model_card_data  # it holds on to the trainer


def test_a_bi_encoder_is_loaded_by_its_class(tmp_path):
    model = make_encoder(tmp_path / "one")
    model.save_pretrained(str(tmp_path / "teacher"))
    trainer = make_embedder(tmp_path, slim_teacher=str(tmp_path / "teacher"), **ONLY)
    trainer.train()
    assert type(trainer.teacher_model) is type(model)


def test_a_loss_without_gradients_is_refused(tmp_path):
    trainer = make_embedder(tmp_path, "CachedMultipleNegativesRankingLoss", slim_teacher="self", **ONLY)
    with pytest.raises(ValueError, match="does not call SentenceTransformer with gradients"):
        trainer.train()


def test_a_cross_encoder_learns_from_logits(tmp_path):
    sentence_transformers()
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments

    @dataclass
    class Arguments(SlimArgumentsMixin, CrossEncoderTrainingArguments):
        """CrossEncoderTrainingArguments with the slimming fields."""

    class Taught(SlimTrainerMixin, CrossEncoderTrainer):
        """CrossEncoderTrainer with a teacher."""

    make_encoder(tmp_path / "encoder", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = CrossEncoder(str(tmp_path / "encoder"), num_labels=1, device="cpu")
    trainer = Taught(model, Arguments(str(tmp_path), **{**RUN, **HALF}, slim_teacher="self"), train_dataset=pairs())
    with pytest.warns(UserWarning, match=r"nobody has trained: .*classifier\.weight"):
        trainer.train()
    distances = entries(trainer, "distill_loss")
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[-1] > 0


def test_a_fresh_head_is_warned_about_until_it_is_trained(tmp_path):
    BertModel(dropout_free().config).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"nobody has trained: classifier\.weight, classifier\.bias"):
        make(
            BertForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path, slim_teacher="self", **ONLY
        ).train()
    with pytest.warns(UserWarning, match=r"nobody has trained: classifier\.weight, classifier\.bias"):
        make(dropout_free(), tmp_path, slim_teacher=str(tmp_path / "base"), **ONLY).train()
    trained = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    make(trained, tmp_path, Trainer, **ONLY).train()
    make(dropout_free(), tmp_path, teacher_model=trained, **ONLY).train()  # warnings of ours are errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slim_distill_weight": 1.1}, r"slim_distill_weight must be in \[0, 1\], got 1.1"),
        ({"slim_distill_weight": -0.1}, r"slim_distill_weight must be in \[0, 1\], got -0.1"),
        ({"slim_distill_weight": float("nan")}, r"slim_distill_weight must be in \[0, 1\], got nan"),
        ({"slim_distill_weight": "half"}, "slim_distill_weight must be a number, got 'half'"),
        ({"slim_temperature": 0}, "slim_temperature must be above 0, got 0.0"),
        ({"slim_hidden_weight": -1}, "slim_hidden_weight must not be below 0, got -1.0"),
        ({"slim_distill_from": "last_hidden"}, "slim_hidden_weight=0.0 gives it no weight"),
        ({"slim_distill_from": "logits"}, "slim_distill_from must be one of outputs, last_hidden, got 'logits'"),
        ({"slim_teacher": ""}, "slim_teacher must be 'self', a folder or a Hub name, got ''"),
        ({"slim_teacher": 3}, "slim_teacher must be 'self', a folder or a Hub name, got 3"),
        ({"slim_teacher_dtype": "int8"}, "slim_teacher_dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"slim_teacher_dtype": "float8_e4m3fn"}, "must be one of float32, bfloat16, float16, got 'float8_e4m3fn'"),
        ({"slim_teacher_dtype": "half16"}, "must be one of float32, bfloat16, float16, got 'half16'"),
        ({"slim_cache_teacher": "yes"}, "slim_cache_teacher must be True or False, got 'yes'"),
    ],
)
def test_values_out_of_range_are_refused_with_the_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        SlimConfig(**settings)


def test_what_cannot_be_a_teacher_is_refused_at_once(tmp_path):
    model = dropout_free()
    tied = copy.deepcopy(model)
    tied.classifier.weight = model.classifier.weight
    for teacher, settings, message in (
        (model, {}, "The teacher has bert.embeddings.word_embeddings.weight in common"),
        (tied, {}, "The teacher has classifier.weight in common"),
        (dropout_free(seed=3), {"slim_teacher": "self"}, "given twice, as teacher_model and as slim_teacher='self'"),
        (None, {"slim_teacher": "dense"}, "slim_teacher='dense' is for `hf-slim run`"),
        ("self", {}, "teacher_model must be a model, got 'self'"),
        (build("bert", vocab_size=98), {}, "another vocabulary than .* vocab_size is 98 and 99"),
        (
            build("bert", id2label={0: "LABEL_1", 1: "LABEL_0"}),
            {},
            "in another order: LABEL_1, LABEL_0 and LABEL_0, L",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, tmp_path, teacher_model=teacher, **settings)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"num_labels": 3}, {}, r"gives logits of another shape than .*\(4, 3\) and \(4, 2\).* number of labels"),
        ({"num_hidden_layers": 3}, {"slim_hidden_weight": 1.0}, "another depth than .* num_hidden_layers is 3 and 2"),
        (
            {"hidden_size": 16},
            {"slim_hidden_weight": 1.0},
            "hidden states of another size .* hidden_size is 16 and 32",
        ),
        ({"hidden_size": 16}, {"slim_hidden_weight": 1.0, "slim_distill_from": "last_hidden"}, "hidden_size is 16"),
    ],
)
def test_another_kind_of_teacher_is_refused(changes, settings, message, tmp_path):
    trainer = make(dropout_free(), tmp_path, teacher_model=build("bert", **changes), **settings, **ONLY)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_smaller_teacher_may_give_logits(tmp_path):
    trainer = make(dropout_free(), tmp_path, teacher_model=build("bert", num_hidden_layers=3, hidden_size=16), **ONLY)
    trainer.train()
    assert entries(trainer, "distill_loss")[0] > 0


def test_an_unknown_name_is_refused(tmp_path):
    trainer = make(dropout_free(), tmp_path, slim_teacher=str(tmp_path / "nowhere"), **ONLY)
    with pytest.raises(ValueError, match="nowhere' is no model that BertForSequenceClassification loads"):
        trainer.train()


@pytest.mark.parametrize("in_arguments", [True, False])
def test_a_teacher_that_nobody_would_ask_is_refused(in_arguments, tmp_path):
    model, data = dropout_free(), make_data(dropout_free())
    fields = {**HALF, "slim_teacher": "self"}
    args = SlimTrainingArguments(tmp_path, **RUN, **fields) if in_arguments else TrainingArguments(tmp_path, **RUN)
    callback = SlimTrainerCallback(None if in_arguments else SlimConfig(**fields))
    with pytest.raises(
        ValueError, match="slim_teacher='self', but the trainer asks no teacher.*train with SlimTrainer"
    ):
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    trainer = SlimTrainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert len(entries(trainer, "distill_loss")) == 12


@pytest.mark.parametrize("trainer_class", [Trainer, SlimTrainer])
def test_settings_about_a_teacher_without_one_are_refused(trainer_class, tmp_path):
    trainer = make(dropout_free(), tmp_path, trainer_class, slim_hidden_weight=2, slim_cache_teacher=True, **ONLY)
    with pytest.raises(ValueError, match="^slim_hidden_weight=2.0, slim_cache_teacher=True, but .* no teacher"):
        trainer.train()


def test_auto_slim_entries_go_with_a_teacher_in_the_arguments(tmp_path):
    model = dropout_free()
    entries_ = parse_auto_slim_config(model, ffn2_sparsity=0.5, start_step=2, end_step=8, pruning_frequency=2)
    trainer = make(
        model, tmp_path, callbacks=[SlimTrainerCallback(entries_)], slim_teacher="self", slim_distill_weight=0.25
    )
    trainer.train()
    tasks, distances = entries(trainer, "task_loss"), entries(trainer, "distill_loss")
    assert entries(trainer)[-1] == pytest.approx(0.75 * tasks[-1] + 0.25 * distances[-1], rel=1e-4)


def test_without_a_teacher_it_is_a_plain_trainer(tmp_path):
    trainer = make(dropout_free(), tmp_path, **ONLY)
    trainer.train()
    assert "task_loss" not in trainer.state.log_history[0]
    assert trainer.teacher_model is None
    assert any(isinstance(callback, TeacherCallback) for callback in trainer.callback_handler.callbacks)


def test_nothing_is_left_on_the_model(tmp_path):
    trainer = make(dropout_free(), tmp_path, slim_teacher="self", **ONLY)
    trainer.train()
    for module in [*trainer.model.modules(), *trainer.teacher_model.modules()]:
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not list(Path(tmp_path).glob("*teacher*"))
