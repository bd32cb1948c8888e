"""Slim models of many layouts in use: every attention implementation, caches, training, compilation, remote code."""

import pytest
import torch
from sparse_models import masked_and_slim

from hf_slim import save_slimmed

GENERATING = ["llama", "phi3", "falcon", "gpt_neox", "gpt_bigcode", "deepseek_v3", "gpt_oss", "olmo2", "qwen3_moe"]
REMOTE = ["phi3", "longformer", "olmo2", "mixtral", "squeezebert", "mpnet", "swin"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", GENERATING)
def test_generation_with_a_cache(model_type, cache):
    model, slim = masked_and_slim(model_type, "AutoModelForCausalLM")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options |= {"return_dict_in_generate": True, "output_logits": True, "cache_implementation": cache}
    ids = torch.randint(10, 90, (1, 5), generator=torch.Generator().manual_seed(0))
    expected, actual = (m.generate(ids, **options) for m in (model, slim))
    assert torch.equal(expected.sequences, actual.sequences)
    for wanted, got in zip(expected.logits, actual.logits, strict=True):
        assert (wanted - got).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "bert"])
def test_attention_implementations(model_type, implementation):
    model, slim = masked_and_slim(model_type)
    ids = torch.randint(10, 90, (1, 16), generator=torch.Generator().manual_seed(0))
    outputs = []
    for each in (model, slim):
        each.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(each(input_ids=ids).last_hidden_state)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-4 * outputs[0].abs().max()


@pytest.mark.parametrize("model_type", ["phi3", "longformer", "olmo2"])
def test_training_goes_on_with_checkpointing_and_compilation(model_type):
    _, slim = masked_and_slim(model_type)
    ids = torch.randint(10, 90, (1, 16), generator=torch.Generator().manual_seed(0))
    slim.train()
    for module in slim.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

    def gradients(run):
        slim.zero_grad()
        run(input_ids=ids).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in slim.named_parameters() if p.grad is not None}

    plain = gradients(slim)
    slim.gradient_checkpointing_enable()
    checkpointed = gradients(slim)
    slim.gradient_checkpointing_disable()
    compiled = gradients(torch.compile(slim, backend="aot_eager"))
    for found in (checkpointed, compiled):
        assert plain.keys() == found.keys()
        for name, wanted in plain.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-6)


WITHOUT_HF_SLIM = """
import sys
import torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    case = torch.load(folder + "/case.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, case["state"][name]), (folder, name)
    with torch.no_grad():
        actual = model(**case["inputs"])[0]
    assert (actual - case["expected"]).abs().max() <= 1e-4 * case["expected"].abs().max(), folder
"""


def test_remote_code_of_many_layouts(warm_python, tmp_path):
    folders = []
    for model_type in REMOTE:
        _, slim = masked_and_slim(model_type)
        folder = tmp_path / model_type
        save_slimmed(slim, folder)
        inputs = {"input_ids": torch.randint(10, 90, (1, 16), generator=torch.Generator().manual_seed(0))}
        if slim.main_input_name == "pixel_values":
            size = slim.config.image_size
            inputs = {"pixel_values": torch.randn(1, slim.config.num_channels, size, size)}
        with torch.no_grad():
            case = {"inputs": inputs, "expected": slim(**inputs)[0], "state": slim.state_dict()}
        torch.save(case, folder / "case.pt")
        folders.append(str(folder))
    done = warm_python.run(WITHOUT_HF_SLIM, *folders, library=False, cwd=tmp_path)
    assert done.status == 0, done.stderr[-3000:]
