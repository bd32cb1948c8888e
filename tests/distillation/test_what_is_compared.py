"""What of model and teacher is compared, and what is refused since it cannot be."""

import copy

import pytest
import torch
from conftest import build
from test_slim_trainer import ONLY, entries, make
from torch import nn
from trainers import NO_DROPOUT, dropout_free, make_data
from transformers import BertForQuestionAnswering

from hf_slim import SlimTrainer, SlimTrainingArguments


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("who", ["model", "teacher"])
def test_outputs_without_names_are_refused(who, family, tmp_path):
    model, teacher = dropout_free(family), dropout_free(family, seed=3)
    (model if who == "model" else teacher).config.return_dict = False
    trainer = make(model, tmp_path, teacher_model=teacher, **ONLY)
    with pytest.raises(ValueError, match="gives neither logits nor embeddings.* no named outputs.* return_dict=True"):
        trainer.train()


def test_labels_with_a_decimal_point_for_every_logit_are_several_labels(tmp_path):
    model, teacher = (build("bert", seed=seed, num_labels=3, **NO_DROPOUT["bert"]) for seed in (0, 3))
    data = [{**row, "labels": torch.tensor([1.0, 0.0, 1.0])} for row in make_data(dropout_free())[:4]]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0] if name != "labels"}
    with torch.no_grad():
        q, p = (torch.stack((m.eval()(**batch).logits / 2, torch.zeros(4, 3)), -1) for m in (model, teacher))
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    divergence = 4 * (p.exp() * (p - q)).sum(-1).mean().item()
    args = SlimTrainingArguments(tmp_path, **{**ONLY, "max_steps": 1})
    trainer = SlimTrainer(
        model,
        args,
        train_dataset=data,
        teacher_model=teacher,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
            nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)
        ),
    )
    trainer.train()
    assert model.config.problem_type is None
    assert entries(trainer, "distill_loss") == [pytest.approx(divergence, rel=1e-4)]


def test_padding_is_no_answer_to_a_question(tmp_path):
    torch.manual_seed(0)
    config = dropout_free().config
    model, teacher = BertForQuestionAnswering(config), BertForQuestionAnswering(config)
    for module in (model, teacher):
        module.qa_outputs.weight.data.mul_(100)
    rows = [torch.randint(3, 99, (length,)) for length in (4, 6, 7, 5)]
    distances = []
    for longest in (7, 12):
        data = [
            {
                "input_ids": nn.functional.pad(row, (0, longest - len(row))),
                "attention_mask": (torch.arange(longest) < len(row)).long(),
                "start_positions": torch.tensor(1),
                "end_positions": torch.tensor(2),
            }
            for row in rows
        ]
        trainer = make(copy.deepcopy(model), tmp_path, teacher_model=teacher, data=data, **{**ONLY, "max_steps": 1})
        trainer.train()
        distances += entries(trainer, "distill_loss")
    expected = []
    for row in rows:
        with torch.no_grad():
            one, two = (m.eval()(input_ids=row[None]) for m in (model, teacher))
        for name in ("start_logits", "end_logits"):
            q, p = ((output[name] / 2).log_softmax(-1) for output in (one, two))
            expected.append(4 * (p.exp() * (p - q)).sum().item())
    assert distances == pytest.approx([sum(expected) / len(expected)] * 2, rel=1e-4)
    assert distances[0] > 0.01


def test_other_lengths_are_named_where_a_prompt_is_tuned(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'hf-slim[integrations]'")
    base = dropout_free("gpt2")
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer = make(model, tmp_path, teacher_model=dropout_free("gpt2", seed=3), data=make_data(base), **ONLY)
    with pytest.raises(ValueError, match="gives logits of another shape .* virtual tokens of prompt tuning"):
        trainer.train()
