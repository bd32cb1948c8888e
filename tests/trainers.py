"""Trainers of tiny models, and what is watched of a training."""

from dataclasses import dataclass

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from conftest import build, make_batch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_slim import (
    SlimArgumentsMixin,
    SlimConfig,
    Slimmer,
    SlimTrainerCallback,
    SlimTrainingArguments,
    find_structures,
)
from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.compaction.zeros import find_zero_units

WORDS = ("a", "the", "cat", "dog", "child", "river", "song", "train", "sees", "likes", "finds", "follows", "not")


STEPS = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
RUN = {**STEPS, "use_cpu": True}


def sentence_transformers():
    return pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed: pip install 'hf-slim[integrations]'"
    )


def pairs():
    from datasets import Dataset

    rows = [
        (f"the {a} sees the {b}", f"a {b} likes a {c}") for a in WORDS[2:5] for b in WORDS[2:6] for c in WORDS[5:8]
    ]
    return Dataset.from_list([{"sentence1": a, "sentence2": b, "score": (n % 5) / 4} for n, (a, b) in enumerate(rows)])


_SHORT = {**RUN, "max_steps": 3, "bf16": False, "per_device_train_batch_size": 2}
HALF = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "slim_round_to": 8, "slim_start": 2, "slim_end": 8}


def make_data(model, rows=32, seed=3):
    """Examples for any tiny model."""
    batches = [make_batch(model, seed=seed + n) for n in range(rows // 2)]
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(2)]


def make_trainer(model, folder, *, callbacks=(), config=None, trainer_class=Trainer, **settings):
    settings = {**STEPS, **settings}
    if config is None:
        args = SlimTrainingArguments(folder, **{**HALF, "slim_live": False, **settings})
    else:
        args = TrainingArguments(folder, **settings)
    data = make_data(model) if model is not None else None
    callbacks = [SlimTrainerCallback(config), *callbacks]
    return trainer_class(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def slim_callback(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SlimTrainerCallback))


class ZeroWatch(TrainerCallback):
    """Counts the dropped units that are not zero at the end of a step, and checks that masks only shrink.

    With live compaction, the structures that have another number of units than their mask keeps.
    """

    def __init__(self):
        self.steps, self.moved, self.returned, self.masks = 0, 0, 0, {}
        self.model, self.structures = None, []

    def on_step_end(self, args, state, control, model, **kwargs):
        callback = next(iter(self.watched))
        is_live = callback.slimming.is_live
        if model is not self.model or is_live:
            self.model = model
            self.structures = [s for s in find_structures(model).structures if s.name in callback.masks]
        self.steps += 1
        if is_live:
            self.moved += sum(s.units != int(callback.masks[s.name].sum()) for s in self.structures)
        else:
            whole = find_zero_units(model, self.structures, whole=True)
            self.moved += sum(int((whole[s.name] & ~callback.masks[s.name]).sum()) for s in self.structures)
        for name, mask in callback.masks.items():
            self.returned += int((mask & ~self.masks.get(name, torch.ones_like(mask))).sum())
        self.masks = {name: mask.clone() for name, mask in callback.masks.items()}


def watch(trainer):
    watcher = ZeroWatch()
    watcher.watched = [slim_callback(trainer)]
    trainer.add_callback(watcher)
    return watcher


def kept(trainer):
    callback = slim_callback(trainer)
    return {name: int(mask.sum()) for name, mask in callback.masks.items()}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Mine(SlimTrainerCallback):
    """A callback of somebody's own, with a state of its own."""

    def __init__(self, config=None):
        super().__init__(config)
        self.steps = 0

    def state(self):
        state = super().state()
        state["attributes"]["steps"] = self.steps
        return state


NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "electra": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
    "bart": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
    "t5-gated": {"dropout_rate": 0.0},
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


class Trajectory(TrainerCallback):
    """Keeps the loss, the masks and the number of parameters of every step."""

    def __init__(self):
        self.losses, self.masks, self.sizes = [], [], []

    def on_log(self, args, state, control, logs, model, **kwargs):
        if "loss" in logs:
            callback = self.watched
            self.losses.append((logs["loss"], logs.get("grad_norm")))
            self.masks.append({name: mask.clone() for name, mask in callback.masks.items()})
            self.sizes.append(sum(p.numel() for p in model.parameters()))


EVERY = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "max_grad_norm": 0.5}


def dropout_free(family="bert", seed=0, **changes):
    return build(family, seed=seed, spread=0.1, **NO_DROPOUT[family], **changes)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def make_sft_trainer(folder, *, in_arguments=True, peft_config=None, **settings):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'hf-slim[integrations]'")
    datasets = pytest.importorskip("datasets")

    @dataclass
    class Arguments(SlimArgumentsMixin, trl.SFTConfig):
        """SFTConfig with the slimming fields."""

    model = build("llama", spread=0.1, vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    data = datasets.Dataset.from_list([{"text": f"the {a} sees the {b}"} for a in WORDS[:6] for b in WORDS[:6]])
    common = {**RUN, "max_length": 32, **settings}
    slim = {name: common.pop(name) for name in [*common] if name.startswith("slim_")}
    args = Arguments(str(folder), **common, **{**HALF, **slim}) if in_arguments else trl.SFTConfig(folder, **common)
    callback = SlimTrainerCallback(None if in_arguments else SlimConfig(**{**HALF, **slim}))
    return trl.SFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=make_byte_tokenizer(),
        callbacks=[callback],
        peft_config=peft_config,
    )


def make_dpo_trainer(folder, base, **slimming):
    """A DPOTrainer of a causal language model saved in the folder `base`, whose reference is that model, whole.

    Without settings of slimming it has no callback either.
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    @dataclass
    class Arguments(SlimArgumentsMixin, trl.DPOConfig):
        """DPOConfig with the slimming fields."""

    rows = [{"prompt": f"the {a}", "chosen": " sees", "rejected": " likes"} for a in WORDS[:8]]
    return trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=Arguments(str(folder), **_SHORT, max_length=32, **slimming),
        ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_byte_tokenizer(),
        callbacks=[SlimTrainerCallback()] if slimming else [],
    )


def make_grpo_trainer(folder, base, **slimming):
    """A GRPOTrainer, the same; it loads its reference model itself."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    @dataclass
    class Arguments(SlimArgumentsMixin, trl.GRPOConfig):
        """GRPOConfig with the slimming fields."""

    sizes = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    return trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=lambda completions, **rest: [float(len(set(text))) for text in completions],
        args=Arguments(str(folder), **_SHORT, **sizes, **slimming),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"the {a}"} for a in WORDS[:8]]),
        processing_class=make_byte_tokenizer(),
        callbacks=[SlimTrainerCallback()] if slimming else [],
    )


def plain_model(trainer):
    """The trainer's model in evaluation mode, without the autocast that accelerate wraps around its forward pass."""
    return extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False).eval()


def make_encoder(folder, **changes):
    """A tiny SentenceTransformer: BERT, pooling, normalization."""
    st = sentence_transformers()
    tokenizer = BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **{**sizes, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    from sentence_transformers.sentence_transformer import modules

    body = modules.Transformer(str(folder))
    return st.SentenceTransformer(modules=[body, modules.Pooling(32), modules.Normalize()], device="cpu")


def make_encoder_trainer(model, folder, **settings):
    st = sentence_transformers()
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    @dataclass
    class Arguments(SlimArgumentsMixin, st.SentenceTransformerTrainingArguments):
        """SentenceTransformerTrainingArguments with the slimming fields."""

    return st.SentenceTransformerTrainer(
        model,
        Arguments(str(folder), **{**RUN, **HALF, **settings}),
        train_dataset=pairs(),
        loss=CosineSimilarityLoss(model),
        callbacks=[SlimTrainerCallback()],
    )


def make_loop(settings=None, *, make=None, seed=0, steps=12, family="bert", **changes):
    """A tiny model with a `Slimmer` attached to its optimizer, by default AdamW."""
    model = dropout_free(family, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if make is None else make(model.parameters())
    settings = SlimConfig(**{**HALF, **changes}) if settings is None else settings
    return model, optimizer, Slimmer(model, settings, steps).attach(optimizer)


def take_steps(model, optimizer, steps):
    """Steps of a plain loop, each on a batch of its own."""
    for step in steps:
        model(**make_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
