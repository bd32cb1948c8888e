"""The flags of `hf-slim bench`."""

import pytest
import torch

from hf_slim.bench.flags import BenchArguments, Sparsity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "^--models is empty: give one value at least"),
        ({"parts": []}, "^--parts is empty: give one value at least"),
        ({"batch_sizes": [1, 0]}, "^--batch_sizes must be a whole number from 1, got 0"),
        ({"sequence_lengths": [-1]}, "^--sequence_lengths must be a whole number from 1, got -1"),
        ({"layers": [-2]}, "^--layers must be a whole number from 1, got -2"),
        ({"repeats": 0}, "^--repeats must be a whole number from 1, got 0"),
        ({"run_steps": 0}, "^--run_steps must be a whole number from 1, got 0"),
        ({"run_repeats": 0}, "^--run_repeats must be a whole number from 1, got 0"),
        ({"threads": 0}, "^--threads must be a whole number from 1, got 0"),
        ({"dtype": "int8"}, "^--dtype must be one of float32, bfloat16, got 'int8'"),
        ({"device": "tpu"}, "^--device must be one of cpu, cuda, got 'tpu'"),
        ({"sparsities": ["0.5"]}, r"^--sparsities takes two numbers .*, such as 0\.8,0\.6, got '0\.5'"),
        ({"sparsities": ["0.5,half"]}, "^--sparsities takes two numbers .*, got '0.5,half'"),
        ({"sparsities": ["0.5,1.5"]}, r"^--sparsities 0\.5,1\.5: mha_sparsity must be in \[0, 1\), got 1\.5"),
        ({"sparsities": ["0,0"]}, "^--sparsities 0,0 removes nothing"),
        ({"output_dir": __file__}, r"^--output_dir .*test_flags\.py is a file; name a folder"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchArguments(**{"models": ["gpt2"]} | changes)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match="^--output_dir .*out is not writable; name another folder"):
        BenchArguments(["gpt2"], output_dir=str(tmp_path / "new" / "out"))


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="^--device cuda: PyTorch finds no GPU here"):
        BenchArguments(["gpt2"], device="cuda")


def test_a_sparsity_is_written_as_it_is_read():
    (sparsity,) = BenchArguments(["gpt2"], sparsities=["0.80,0"]).parsed_sparsities
    assert sparsity == Sparsity(0.8, 0.0) and str(sparsity) == "0.8,0"


def test_the_type_of_the_weights():
    assert BenchArguments(["gpt2"], dtype="bfloat16").torch_dtype is torch.bfloat16
