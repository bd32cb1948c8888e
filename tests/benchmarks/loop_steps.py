"""What a step of a plain loop costs with a `Slimmer` attached: `python tests/benchmarks/loop_steps.py gpt2 8 128`.

Two copies of a model take the same steps in turn, one with a `Slimmer` that scores at every step and drops nothing.
Prints the median of the ratios of both, round by round, and how much of a plain step the hooks themselves take. On a
CPU that is the processor's time in one thread, to which a busy machine adds little.
"""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hf_slim import SlimConfig, Slimmer
from hf_slim.bench.shapes import SHAPES

FAR = 10**6
SCORING = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_start=FAR - 1, slim_end=FAR)


def main(shape: str, rows: int, length: int, layers: int = 4, rounds: int = 30) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loops = {
        name: Loop(shape, rows, length, layers, device, attached=name == "scoring") for name in ("plain", "scoring")
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 3):
        for name in (*loops,) if number % 2 == 0 else (*reversed(loops),):
            seconds = loops[name].step()
            if number >= 3:
                times[name].append(seconds)
    plain = statistics.median(times["plain"])
    ratio = statistics.median(s / p for s, p in zip(times["scoring"], times["plain"], strict=True))
    hooks = statistics.median(loops["scoring"].hooks[3:]) / plain
    print(f"{shape}, {layers} layers, {rows} x {length}, {device}: plain {1000 * plain:.1f} ms, with scoring")
    print(f"{ratio:.4f} times as long (median of {rounds} rounds), {100 * hooks:.2f}% of a plain step in the hooks")


class Loop:
    """A model and its optimizer."""

    def __init__(
        self, shape: str, rows: int, length: int, layers: int, device: torch.device, *, attached: bool
    ) -> None:
        """Build them; with hooks around those of the `Slimmer` that take the time."""
        config = SHAPES[shape]()
        config.num_hidden_layers = layers
        config.pad_token_id = 0
        set_seed(0)
        is_bert = config.model_type == "bert"
        auto = AutoModelForSequenceClassification if is_bert else AutoModelForCausalLM
        self.model = auto.from_config(config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        ids = torch.randint(5, 999, (rows, length), device=device)
        self.batch = {"input_ids": ids, "labels": ids[:, 0] % 2 if is_bert else ids}
        self.device, self.hooks = device, []
        if attached:
            self.optimizer.register_step_pre_hook(lambda *_: self._begin())
            Slimmer(self.model, SCORING, FAR).attach(self.optimizer)
            self.optimizer.register_step_pre_hook(lambda *_: self._end())

    def step(self) -> float:
        """Take a step; gives its seconds."""
        begin = self._now()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - begin

    def _begin(self) -> None:
        self._began = self._now()

    def _end(self) -> None:
        self.hooks.append(self._now() - self._began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
