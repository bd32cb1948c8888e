"""The parameter counts of the system that hf_slim is modelled on, at the real sizes of its models."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer

from hf_slim import SlimTrainerCallback, SlimTrainingArguments, save_slimmed


@pytest.mark.parametrize(
    ("hidden_size", "before", "after"),
    [(384, 33_360_385, 18_002_305), pytest.param(768, 109_483_009, 48_096_001, marks=pytest.mark.slow)],
)
def test_bge_shapes(hidden_size, before, after, tmp_path):
    config = BertConfig(
        vocab_size=30522,
        hidden_size=hidden_size,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=4 * hidden_size,
        num_labels=1,
    )
    args = SlimTrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        ffn2_sparsity=0.8,
        mha_sparsity=0.6,
        slim_scope="local",
        slim_round_to=32,
        save_strategy="no",
        report_to="none",
    )
    data = [{"input_ids": torch.arange(9) + 9 * row, "labels": float(row % 2)} for row in range(8)]
    trainer = Trainer(
        BertForSequenceClassification(config), args, train_dataset=data, callbacks=[SlimTrainerCallback()]
    )
    trainer.train()
    report = save_slimmed(trainer, tmp_path / "slim")
    assert (report.parameters_before, report.parameters_after) == (before, after)
