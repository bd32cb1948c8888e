"""Which widths of a feed-forward network the device likes: the time per channel by what the width is a multiple of.

`python tests/benchmarks/widths.py` times two linear layers with a GELU between them at every fourth width, in turn,
and prints for each largest power of two that divides the width the median time per channel, relative to the best.
"""

import argparse
import statistics

import torch
from torch import nn

from hf_slim.costs.timing import time_alternately

STEP = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs=2, default=(256, 512), help="The smallest and the largest")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden = torch.randn(options.tokens, options.hidden_size, **kind)
    widths = range(options.widths[0], options.widths[1] + 1, STEP)
    networks = {
        width: nn.Sequential(
            nn.Linear(options.hidden_size, width, **kind), nn.GELU(), nn.Linear(width, options.hidden_size, **kind)
        )
        for width in widths
    }
    calls = {str(width): (lambda network=network: network(hidden)) for width, network in networks.items()}
    with torch.inference_mode():
        times = time_alternately(calls, repeats=options.repeats, device=torch.device(options.device), desc="Widths")
    cost = {width: statistics.median(times[str(width)]) / width for width in widths}
    # Narrow networks cost more a channel, whatever the width is a multiple of: compare each with its neighbours.
    near = {w: statistics.median(c for v, c in cost.items() if abs(v - w) <= 64) for w in widths}
    groups: dict[int, list[float]] = {}
    for width in widths:
        groups.setdefault(min(32, width & -width), []).append(cost[width] / near[width])
    medians = {power: statistics.median(ratios) for power, ratios in sorted(groups.items())}
    print("largest power of two in the width   time per channel, relative")
    for power, ratio in medians.items():
        print(f"{'32 or more' if power == 32 else power!s:>33}   {ratio / min(medians.values()):.3f}")


if __name__ == "__main__":
    main()
