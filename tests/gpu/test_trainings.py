"""Trainings on a GPU: `pytest -m gpu`.

Without a GPU those that a CPU can take run there, and the others are skipped.
"""

import gc
import os

import pytest
import torch
from conftest import build, half_masks, logits, make_batch
from trainers import NO_DROPOUT, Trajectory, dropout_free, make_trainer, slim_callback
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_slim import find_structures, model_slim, save_slimmed
from hf_slim.compaction.zeros import zero_units

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
pytestmark = pytest.mark.gpu

TYPES = [
    pytest.param({}, id="float32"),
    pytest.param({"bf16": True}, id="bf16"),
    pytest.param({"fp16": True}, id="fp16", marks=NEEDS_GPU),  # its scaler is one of CUDA's
]


def train(family, folder, **settings):
    trainer = make_trainer(
        build(family, spread=0.1, **NO_DROPOUT.get(family, {})), folder, use_cpu=not ON_GPU, **settings
    )
    trajectory = Trajectory()
    trajectory.watched = slim_callback(trainer)
    trainer.add_callback(trajectory)
    trainer.train()
    return trainer, trajectory


def place(batch):
    return {key: value.to(DEVICE) for key, value in batch.items()}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_live_is_the_same_training(family, tmp_path):
    _, masked = train(family, tmp_path / "masked", slim_live=False, optim="adamw_torch_fused")
    trainer, live = train(family, tmp_path / "live", slim_live=True, optim="adamw_torch_fused")
    for pair, other in zip(masked.losses, live.losses, strict=True):
        assert pair == pytest.approx(other, rel=1e-3)
    for masks, others in zip(masked.masks, live.masks, strict=True):
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    assert all(parameter.device.type == DEVICE for parameter in trainer.model.parameters())


@pytest.mark.parametrize("settings", TYPES)
def test_a_fused_optimizer_in_every_type(settings, tmp_path):
    trainer, trajectory = train("bert", tmp_path, slim_live="auto", optim="adamw_torch_fused", **settings)
    assert slim_callback(trainer).slimming.is_live
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert all(loss < float("inf") for loss, _ in trajectory.losses)
    for structure in find_structures(trainer.model).structures:
        assert structure.units == int(slim_callback(trainer).masks[structure.name].sum())
    for parameter, state in trainer.optimizer.optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    save_slimmed(trainer, tmp_path / "slim")  # proves that it computes the same; the trainer's forward is in autocast
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").state_dict()
    weights = trainer.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].cpu()) for name, tensor in loaded.items())


@NEEDS_GPU
def test_steps_that_the_scaler_skips_drop_nothing(tmp_path):
    steps = {"max_steps": 24, "slim_start": 1, "slim_end": 20}
    trainer = make_trainer(dropout_free(), tmp_path, fp16=True, slim_live=True, **steps)
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**24  # steps were skipped
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@NEEDS_GPU
@pytest.mark.parametrize("live", [True, False])
def test_inductor(live, tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "inductor", "slim_frequency": 3}
    _, plain = train("bert", tmp_path / "plain", slim_live=live, slim_frequency=3)
    trainer, compiled = train("bert", tmp_path / "compiled", slim_live=live, **settings)
    for pair, other in zip(plain.losses, compiled.losses, strict=True):
        assert pair == pytest.approx(other, rel=1e-2)
    assert slim_callback(trainer).slimming.is_live == live


@NEEDS_GPU
def test_memory_is_given_back(tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 4096}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))
    gc.collect()
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(
        model, tmp_path, slim_live=True, ffn2_sparsity=0.9, mha_sparsity=0.5, optim="adamw_torch_fused"
    )
    trainer.train()
    trainer.optimizer.zero_grad()
    gc.collect()
    tensors = {id(p): p for p in (*model.parameters(), *model.buffers())}
    for state in trainer.optimizer.optimizer.state.values():
        tensors |= {id(value): value for value in state.values() if torch.is_tensor(value)}
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    dense = sum(p.numel() for p in BertForSequenceClassification(model.config).parameters()) * 12
    assert held < 0.45 * dense
    assert torch.cuda.memory_allocated() - before < 1.1 * held + 2**23


@NEEDS_GPU
def test_a_model_in_part_on_the_cpu(tmp_path):
    model = build("llama")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": 0}
    placed = type(model).from_pretrained(tmp_path, device_map=places).eval()
    batch = make_batch(model)
    expected = logits(placed, place(batch))
    model_slim(placed, 1)
    assert torch.allclose(logits(placed, place(batch)), expected, atol=1e-4)
    assert all(s.units < structures[0].units for s in find_structures(placed).structures)


@NEEDS_GPU
def test_fsdp_2_in_one_process(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(20000 + os.getpid() % 20000))
    settings = {"slim_live": False, "fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    trainer, _ = train("llama", tmp_path / "sharded", **settings)
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    report = save_slimmed(trainer, tmp_path / "slim")
    assert report.parameters_after < report.parameters_before
