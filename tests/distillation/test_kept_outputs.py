"""What a teacher says of a row is kept, and right in whatever batch the row comes again."""

import pytest
import torch
from conftest import build
from test_slim_trainer import entries, make, other
from trainers import RUN, dropout_free
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_slim import SlimTrainer, SlimTrainingArguments
from hf_slim.distillation.distiller import Distiller
from hf_slim.distillation.kept_outputs import KeptOutputs


def rows(count=12, seed=5, longest=11):
    """Rows of different lengths, without padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + number % (longest - 2) for number in range(count)]
    return [torch.randint(3, 99, (length,), generator=generator) for length in lengths]


def pad(some, length=None, left=False):
    length = length or max(map(len, some))
    ids, mask = torch.zeros(len(some), length, dtype=torch.long), torch.zeros(len(some), length, dtype=torch.long)
    for number, row in enumerate(some):
        places = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, places], mask[number, places] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


class Counting:
    """Asks a model, and counts how often."""

    def __init__(self, model, name="logits"):
        self.model, self.name, self.calls = model.eval(), name, 0

    @torch.no_grad()
    def __call__(self, inputs):
        self.calls += 1
        output = self.model(*inputs[0], **inputs[1], output_hidden_states=True)
        return {"logits": output.logits, "hidden_states.2": output.hidden_states[2]}


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta", "llama"])
def test_rows_are_found_again_in_other_batches_and_paddings(family):
    model = build(family, spread=0.1)
    kept, ask, data = KeptOutputs(), Counting(model), rows()
    for first in range(0, 12, 4):
        kept.find(((), pad(data[first : first + 4])), ask)
    assert len(kept) == 12 and ask.calls == 4  # one of them for one row alone
    for order, length in (([0, 5, 11], None), ([8, 2], 30), ([7], None)):
        batch = pad([data[number] for number in order], length)
        got = kept.find(((), batch), ask)
        assert ask.calls == 4
        wanted = Counting(model)(((), batch))
        mask = batch["attention_mask"].bool()
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert got[name].shape == wanted[name].shape
            one, two = (t[mask] if t.dim() == 3 else t for t in (got[name], wanted[name]))
            assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("change", ["token", "type", "left", "length"])
def test_another_row_is_not_taken_for_one_that_is_known(change):
    kept, ask, data = KeptOutputs(), Counting(build("bert", spread=0.1)), rows(4)
    batch = {**pad(data), "token_type_ids": torch.zeros_like(pad(data)["input_ids"])}
    kept.find(((), batch), ask)
    calls = ask.calls
    kept.find(((), batch), ask)
    assert ask.calls == calls
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    if change == "token":
        changed["input_ids"][0, 0] = 98 - changed["input_ids"][0, 0]
    elif change == "type":
        changed["token_type_ids"][1, 1] = 1
    elif change == "left":
        changed |= pad(data, left=True)
    else:
        changed["attention_mask"][3, -1] = 0
    got = kept.find(((), changed), ask)
    assert ask.calls == calls + 1
    assert torch.equal(got["logits"], Counting(ask.model)(((), changed))["logits"])


def test_a_tensor_with_a_number_for_each_position_is_kept_for_its_length_only():
    def ask(inputs):
        calls.append(1)
        return {"start_logits": inputs[1]["input_ids"].float() * inputs[1]["attention_mask"]}

    calls, kept, data = [], KeptOutputs(), rows(4)
    for length in (12, 12, 20):
        batch = pad(data, length)
        assert torch.equal(kept.find(((), batch), ask)["start_logits"], batch["input_ids"].float())
    assert len(calls) == 3  # two for the first, with the row alone, none for the second


def test_as_many_classes_as_positions_are_kept_whole():
    model, kept, data = build("bert", spread=0.1, num_labels=6), KeptOutputs(), rows(4, longest=6)
    ask = Counting(model)
    batch = pad(data)
    assert batch["input_ids"].shape[1] == 6
    first = kept.find(((), batch), ask)["logits"]
    calls = ask.calls
    assert torch.equal(kept.find(((), batch), ask)["logits"], first)
    assert ask.calls == calls


@pytest.mark.parametrize("what", ["rows", "padding"])
def test_a_teacher_that_mixes_rows_or_reads_padding_is_refused(what):
    def ask(inputs):
        ids, mask = inputs[1]["input_ids"].float(), inputs[1]["attention_mask"]
        found = ids.mean(0, keepdim=True) + ids[:, :1] if what == "rows" else ids.mean(1, keepdim=True).expand(-1, 2)
        return {"logits": found[:, :2] + 0 * mask[:, :1]}

    with pytest.raises(ValueError, match="depends on the other rows of the batch or on padding"):
        KeptOutputs().find(((), pad(rows(4))), ask)


def test_data_that_change_are_asked_for_each_time_and_warned_about():
    kept, ask = KeptOutputs(), Counting(build("bert", spread=0.1))
    kept.find(((), pad(rows(4))), ask)
    kept.is_full = True
    calls = ask.calls
    with pytest.warns(UserWarning, match="a row was not among those of the first epoch"):
        got = kept.find(((), pad(rows(4, seed=9))), ask)
    assert ask.calls == calls + 1 and len(kept) == 4
    assert torch.equal(got["logits"], Counting(ask.model)(((), pad(rows(4, seed=9))))["logits"])


def test_a_training_asks_once_for_each_row(tmp_path):
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": n % 2} for n, row in enumerate(rows(16))
    ]
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0}, "[PAD]")), pad_token="[PAD]"
    )
    results = []
    for cached in (False, True):
        teacher = other(dropout_free())
        calls = []
        teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        args = SlimTrainingArguments(
            tmp_path, **{**RUN, "max_steps": 12}, slim_cache_teacher=cached, slim_hidden_weight=1.0
        )
        trainer = SlimTrainer(
            dropout_free(),
            args,
            train_dataset=data,
            teacher_model=teacher,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        results.append((len(calls), entries(trainer, "distill_loss")))
    assert [count for count, _ in results] == [12, 5]  # four batches, and one row alone
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


def test_rows_with_two_lengths_are_refused(tmp_path):
    trainer = make(dropout_free("t5"), tmp_path, slim_teacher="self", slim_cache_teacher=True, max_steps=2)
    with pytest.raises(ValueError, match="slim_cache_teacher does not work with encoder-decoder models"):
        trainer.train()


def test_a_row_in_half_precision_is_kept_so(tmp_path):
    from hf_slim import SlimConfig

    model, teacher = dropout_free(), other(dropout_free())
    settings = SlimConfig(slim_cache_teacher=True, slim_teacher_dtype="bfloat16")
    distiller = Distiller(teacher.to(torch.bfloat16), model, settings)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    for _ in range(2):
        with distiller.watch() as calls:
            model(**pad(rows(4)))
        assert distiller.measure(calls) > 0
    (row, *_) = distiller.kept._rows.values()
    assert row.signals["logits"].dtype == torch.bfloat16
