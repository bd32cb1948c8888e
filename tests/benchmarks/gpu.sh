#!/usr/bin/env bash
# What is worth running on a GPU, in under nine minutes: bash tests/benchmarks/gpu.sh OUT [--dry]
#
# Runs the tests marked `gpu`, hf-slim bench in bfloat16, the widths that the device likes, and fine-tuning dense against
# live. Each part writes a log of its own into OUT, and is stopped when its time is up; what it has written stays. The
# package has to be installed: pip install -e ".[test]". With --dry everything is run to its end with tiny shapes, on
# the CPU where there is no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ $# -lt 1 ]; then
    echo "usage: bash tests/benchmarks/gpu.sh OUT [--dry]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
failed=0

part() { # name, seconds, command
    local name=$1 seconds=$2
    shift 2
    echo "+ $*"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n 3 "$out/$name.log"
    if [ $status -ne 0 ]; then
        echo "$name: exit status $status, see $out/$name.log"
        failed=1
    fi
}

if [ "${2:-}" = --dry ]; then
    python -c "
from transformers import LlamaConfig
sizes = {'hidden_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 8, 'num_key_value_heads': 4}
LlamaConfig(vocab_size=1000, intermediate_size=512, **sizes).save_pretrained('$out/tiny')"
    device=$(python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
    common=(--device "$device" --sequence_lengths 16 --sparsities 0.5,0.5 --repeats 2)
    part tests 300 pytest -n 0 -m gpu tests/gpu
    part bench 120 hf-slim bench --models "$out/tiny" --dtype bfloat16 --batch_sizes 1 4 --parts train inference \
        "${common[@]}" --output_dir "$out/bench"
    part widths 60 python tests/benchmarks/widths.py --device "$device" --dtype bfloat16 --hidden_size 64 --tokens 64 \
        --widths 64 128 --repeats 3
    part run 120 hf-slim bench --models "$out/tiny" --batch_sizes 4 --parts run --run_steps 10 --run_repeats 1 \
        "${common[@]}" --output_dir "$out/run"
    exit $failed
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/machine.csv"
common=(--device cuda --dtype bfloat16 --sequence_lengths 128)
part tests 150 pytest -n 4 -m gpu tests/gpu
part bench 240 hf-slim bench --models bge-base gpt2 llama-1b --batch_sizes 1 16 64 256 --sparsities 0.5,0.5 0.8,0.6 \
    --parts train inference --repeats 5 "${common[@]}" --output_dir "$out/bench"
part widths 30 python tests/benchmarks/widths.py --device cuda --dtype bfloat16 --hidden_size 2048 --tokens 8192 \
    --widths 1024 2048
part run 90 hf-slim bench --models bge-base gpt2 --batch_sizes 64 --sparsities 0.8,0.6 --parts run --run_steps 100 \
    --run_repeats 2 "${common[@]}" --output_dir "$out/run"
exit $failed
