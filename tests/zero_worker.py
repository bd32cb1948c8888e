"""One rank of tests/test_zero.py: trains a tiny model, in one plain process or under DeepSpeed ZeRO.

Run as `torchrun zero_worker.py SETTINGS.json`; rank 0 writes what it saw beside the settings.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import build, make_batch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_slim import find_structures
from hf_slim.parallel.deepspeed_zero import (
    call_before_step,
    clip_factor,
    find_zero_optimizer,
    reduce_sums,
    sum_positions,
    whole_shapes,
    whole_state_dict,
    write_zeros_everywhere,
)

DROP_AT, STEPS = 3, 7


class Watch(TrainerCallback):
    """Scores all members at each step, drops every third unit at one, and counts what is not zero after each."""

    def __init__(self):
        self.order, self.scores, self.moved, self.returned, self.clips = [], [], 0, 0, []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.zero = find_zero_optimizer(optimizer)
        with whole_shapes(model):
            self.structures = find_structures(model).structures
        self.members = [
            (get(model, m.tensor), m) for s in self.structures for m in s.members if m.role in ("output", "input")
        ]
        places = {}
        for s in self.structures:
            dropped = torch.arange(s.units) % 3 == 1
            for (name, dim), where in s.positions(dropped).items():
                places[name, dim] = where
        self.zeros = [(get(model, name), dim, where) for (name, dim), where in places.items()]
        self.untouched = self._count(model)
        if self.zero is not None:
            self.undo = call_before_step(self.zero, self.score_parts)

    def score_parts(self, loss_scale):
        self.order.append("score")
        sums = [sum_positions(t, m.dim, torch.mul, gradient=True) for t, m in self.members]
        self.pending = torch.cat(reduce_sums(self.zero, sums)) / loss_scale

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.order.append("pre")
        if self.zero is None:
            sums = [(t.detach() * t.grad).sum([d for d in range(t.dim()) if d != m.dim]) for t, m in self.members]
            self.pending = torch.cat(sums)

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.order.append("post")
        self.clips.append(1.0 if self.zero is None else clip_factor(self.zero))
        self.scores.append(self.pending.cpu() * self.clips[-1])
        if state.global_step + 1 > DROP_AT:
            self.moved += self._count(model)
        if state.global_step + 1 >= DROP_AT:
            for tensor, dim, where in self.zeros:
                if self.zero is None:
                    tensor.data.index_fill_(dim, where, 0)
                else:
                    write_zeros_everywhere(tensor, dim, where)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step >= DROP_AT:
            self.returned += self._count(model)

    def _count(self, model):
        """Non-zero numbers at the places of dropped units, in the parameters and in the fp32 master copies."""
        if self.zero is None:
            return sum(int((t.detach().index_select(dim, where) != 0).sum()) for t, dim, where in self.zeros)
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        count = 0
        for tensor, dim, where in self.zeros:
            count += int((safe_get_full_fp32_param(tensor).index_select(dim, where) != 0).sum())
            with GatheredParameters([tensor]):
                count += int((tensor.detach().index_select(dim, where) != 0).sum())
        return count


def get(model, name):
    return dict(model.named_parameters(remove_duplicate=False))[name]


def main():
    file = Path(sys.argv[1])
    settings = json.loads(file.read_text())
    args = TrainingArguments(
        str(file.parent / "out"),
        max_steps=STEPS,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    model = build("bert", spread=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batches = [make_batch(model, seed=3 + n) for n in range(16)]
    data = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(2)]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    plain_structures = str(find_structures(model))
    watch = Watch()
    trainer = Trainer(model, args, train_dataset=data, callbacks=[watch])
    trainer.train()
    trainer.save_model(str(file.parent / "saved"))
    state = model.state_dict() if watch.zero is None else whole_state_dict(trainer.model)
    sums = [t.detach().flatten()[:0] for t, _ in watch.members]
    if watch.zero is not None:
        sums = [sum_positions(t, m.dim, torch.abs, gradient=False) for t, m in watch.members]
        sums = reduce_sums(watch.zero, sums)
    with whole_shapes(trainer.model):
        same = str(find_structures(trainer.model)) == plain_structures
        same = same and shapes == {name: list(p.shape) for name, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        saved = load_file(file.parent / "saved" / "model.safetensors")
        torch.save(
            {
                "scores": torch.stack(watch.scores),
                "clips": watch.clips,
                "order": watch.order,
                "untouched": watch.untouched,
                "moved": watch.moved,
                "returned": watch.returned,
                "state": state,
                "saved": saved,
                "sizes": torch.cat(sums).cpu(),
                "members": [(m.tensor, m.dim) for _, m in watch.members],
                "zeros": [
                    (n, d, w) for (n, p) in trainer.model.named_parameters() for t, d, w in watch.zeros if t is p
                ],
                "same_structures": same,
                "kind": type(watch.zero).__name__,
            },
            file.parent / "seen.pt",
        )


if __name__ == "__main__":
    main()
