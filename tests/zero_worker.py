"""One rank of test_deepspeed_zero.py: trains a tiny model, in one plain process or under DeepSpeed ZeRO.

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
from hf_slim.parallel.deepspeed_zero import ZeroPartitions, whole_shapes, whole_state_dict
from hf_slim.parallel.shards import find_shards

DROP_AT, STEPS = 3, 7


class Watch(TrainerCallback):
    """Scores all members at each step, drops every third unit at one, and counts what is not zero after each."""

    def __init__(self):
        self.order, self.scores, self.moved, self.returned, self.clips = [], [], 0, 0, []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.shards = find_shards(model, optimizer)
        self.is_zero, self.kind = isinstance(self.shards, ZeroPartitions), type(optimizer.optimizer).__name__
        with whole_shapes(model):
            self.structures = find_structures(model).structures
        self.members = [
            (get(model, m.tensor), m) for s in self.structures for m in s.members if m.role in ("output", "input")
        ]
        self.places = [(m.tensor, m.dim) for _, m in self.members]
        places = {}
        for s in self.structures:
            dropped = torch.arange(s.units) % 3 == 1
            for (name, dim), where in s.positions(dropped).items():
                places[name, dim] = where
        self.named = [(name, dim, where) for (name, dim), where in places.items()]
        self.zeros = [(get(model, name), dim, where) for (name, dim), where in places.items()]
        self.untouched = self._count(model)
        self.undo = self.shards.call_before_step(lambda: self.score_parts(model))

    def score_parts(self, model):
        self.order.append("score")
        sums = self.shards.sum_products(model, self.places, torch.mul, gradient=True)
        self.pending = torch.cat([sums[place] for place in self.places])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.order.append("pre")
        if not self.is_zero:
            sums = [(t.detach() * t.grad).sum([d for d in range(t.dim()) if d != m.dim]) for t, m in self.members]
            self.pending = torch.cat(sums)

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.order.append("post")
        self.clips.append(self.shards.clip_factor())
        self.scores.append(self.pending.cpu() * self.clips[-1])
        if state.global_step + 1 > DROP_AT:
            self.moved += self._count(model)
        if state.global_step + 1 >= DROP_AT:
            for tensor, dim, where in self.zeros:
                if not self.is_zero:
                    tensor.data.index_fill_(dim, where, 0)
                else:
                    self.shards.write_zeros(tensor, dim, where)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step >= DROP_AT:
            self.returned += self._count(model)

    def _count(self, model):
        """Non-zero numbers at the places of dropped units, in the parameters and in the fp32 master copies."""
        if not self.is_zero:
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


def bring_back_one(model, watch):
    """Which zeros are found to have returned, before and after one has, as something else may write weights."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    before = watch.shards.find_returned(model, watch.named)
    tensor, dim, where = watch.zeros[0]
    safe_set_full_fp32_param(tensor, safe_get_full_fp32_param(tensor).index_fill(dim, where[-1:], 1.0))
    return [before, watch.shards.find_returned(model, watch.named)]


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
    state = whole_state_dict(trainer.model) if watch.is_zero else model.state_dict()
    sums = watch.shards.sum_products(trainer.model, watch.places, torch.abs, gradient=False)
    found = bring_back_one(trainer.model, watch) if watch.is_zero else []
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
                "sizes": torch.cat([sums[place] for place in watch.places]).cpu(),
                "members": watch.places,
                "zeros": [
                    (n, d, w) for (n, p) in trainer.model.named_parameters() for t, d, w in watch.zeros if t is p
                ],
                "found": found,
                "same_structures": same,
                "kind": watch.kind,
            },
            file.parent / "seen.pt",
        )


if __name__ == "__main__":
    main()
