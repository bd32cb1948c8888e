"""Models whose weights accelerate keeps elsewhere: compacted where they are, saved, and run as before."""

import copy
import os
from types import MappingProxyType

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import build, half_masks, logits, make_batch

from hf_slim import find_structures, model_slim, save_slimmed
from hf_slim.compaction.zeros import find_zero_units, zero_units
from hf_slim.parallel.offloaded_weights import read_tensor
from hf_slim.proof.output_comparison import VerificationError

LAYERS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
    pytest.mark.parametrize("name", LAYERS),
]


def device_map(model, layers):
    """The first layer in memory, all else on disk."""
    places = {}
    for path, _ in model.named_modules():
        inside = any(path.startswith(f"{place}.") for place in places)
        if path and not inside and not f"{layers}.".startswith(f"{path}."):
            places[path] = "cpu" if path == f"{layers}.0" else "disk"
    return places


def masked(name, folder):
    """A masked model and the same offloaded, with the masks."""
    model = build(name)
    structures = find_structures(model).structures
    masks = half_masks(structures, keep=lambda s: s.units // 2 - (s.kind == "mha" and ".1." in s.name))
    zero_units(model, structures, masks)
    model.save_pretrained(folder / "masked")
    places = device_map(model, LAYERS[name])
    offloaded = type(model).from_pretrained(folder / "masked", device_map=places, offload_folder=folder / "off").eval()
    assert {p.is_meta for p in offloaded.parameters()} == {True, False}
    return model, offloaded, masks


def assert_same_weights(offloaded, model):
    for key, tensor in model.state_dict().items():
        assert torch.equal(read_tensor(offloaded, key), tensor), key
        assert offloaded.state_dict()[key].shape == tensor.shape, key


def test_an_offloaded_model_becomes_what_the_whole_one_becomes(name, tmp_path):
    model, offloaded, masks = masked(name, tmp_path)
    batch, before = make_batch(model), (tmp_path / "masked" / "model.safetensors").read_bytes()
    expected = logits(offloaded, batch)
    found = find_zero_units(offloaded, find_structures(offloaded).structures)
    assert all(torch.equal(found[key], mask) for key, mask in masks.items())
    assert model_slim(offloaded, 1) is offloaded
    model_slim(model, 1)
    assert_same_weights(offloaded, model)
    assert torch.equal(logits(offloaded, batch), logits(model, batch))
    torch.testing.assert_close(logits(offloaded, batch), expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "masked" / "model.safetensors").read_bytes() == before
    offloaded.save_pretrained(tmp_path / "slim")
    loaded = type(model).from_pretrained(tmp_path / "slim")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("where", ["record", "comparison"])
def test_an_offloaded_model_is_put_back_where_it_was_kept(name, where, tmp_path, monkeypatch):
    model, offloaded, _ = masked(name, tmp_path)
    slim = model_slim(copy.deepcopy(model), 1)
    batch = make_batch(model)
    expected, before = logits(offloaded, batch), (tmp_path / "masked" / "model.safetensors").read_bytes()
    parameters = dict(offloaded.named_parameters())
    with monkeypatch.context() as patch:
        if where == "record":
            patch.setattr("hf_slim.compaction.proven_removal.record_shapes", lambda *_: 1 / 0)
        else:
            patch.setattr("hf_slim.proof.output_comparison.TOLERANCES", {torch.float32: -1.0, torch.float64: -1.0})
        with pytest.raises(ZeroDivisionError if where == "record" else VerificationError):
            model_slim(offloaded, 1)
    assert_same_weights(offloaded, model)
    assert {p.is_meta for p in offloaded.parameters()} == {True, False}
    assert all(p is parameters[key] for key, p in offloaded.named_parameters())
    assert torch.equal(logits(offloaded, batch), expected)
    assert (tmp_path / "masked" / "model.safetensors").read_bytes() == before
    model_slim(offloaded, 1)
    assert_same_weights(offloaded, slim)


def test_zeroing_an_offloaded_model(name, tmp_path):
    model, offloaded, masks = masked(name, tmp_path)
    structures = find_structures(model).structures
    masks = {key: mask & half_masks(structures, seed=5)[key] for key, mask in masks.items()}
    zero_units(model, structures, masks)
    zero_units(offloaded, structures, masks)
    assert_same_weights(offloaded, model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_saving_an_offloaded_model(name, verify, inplace, tmp_path):
    model, offloaded, _ = masked(name, tmp_path)
    batch, slim = make_batch(model), model_slim(copy.deepcopy(model))
    expected = logits(offloaded, batch)
    report = save_slimmed(offloaded, tmp_path / "slim", verify=verify, inplace=inplace)
    assert report.parameters_after < report.parameters_before
    if inplace:  # what it was before is known of it afterwards, too
        assert save_slimmed(offloaded, tmp_path / "slim", verify=False).parameters_before == report.parameters_before
    loaded = type(model).from_pretrained(tmp_path / "slim")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in slim.state_dict().items())
    assert_same_weights(offloaded, slim if inplace else model)
    torch.testing.assert_close(logits(offloaded, batch), expected, rtol=1e-5, atol=0 if not inplace else 1e-5)
    assert bool(os.listdir(tmp_path / "off")) == inplace
    assert sorted(os.listdir(tmp_path)) == ["masked", "off", "slim"]


def test_weights_that_are_kept_in_memory(name, tmp_path):
    model, _, _ = masked(name, tmp_path)
    kept = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    model_slim(kept, 1)
    model_slim(model, 1)
    assert_same_weights(kept, model)
    assert torch.equal(logits(kept, make_batch(model)), logits(model, make_batch(model)))


def test_weights_that_accelerate_wrote(name, tmp_path):
    """Each to a file of its own, which may serve other models as well."""
    model, _, _ = masked(name, tmp_path)
    places = device_map(model, LAYERS[name])
    written = dispatch_model(copy.deepcopy(model), places, offload_dir=tmp_path / "dat")
    files = {path: path.read_bytes() for path in (tmp_path / "dat").glob("*.dat")}
    assert files
    save_slimmed(written, tmp_path / "slim")
    model_slim(written)
    model_slim(model)
    assert_same_weights(written, model)
    assert torch.equal(logits(written, make_batch(model)), logits(model, make_batch(model)))
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_model_without_a_folder_is_refused(name, tmp_path):
    model, _, _ = masked(name, tmp_path)
    offloaded = type(model).from_pretrained(tmp_path / "masked", device_map=device_map(model, LAYERS[name]))
    expected = logits(offloaded, make_batch(model))
    with pytest.raises(ValueError, match=f"^{LAYERS[name]}.1.* is offloaded to the files .*pass offload_folder to"):
        model_slim(offloaded)
    assert torch.equal(logits(offloaded, make_batch(model)), expected)


def test_a_tied_weight_is_refused(name, tmp_path):
    model, offloaded, _ = masked(name, tmp_path)
    structure = find_structures(model).structures[-1]
    tensor = structure.outputs[0].tensor
    offloaded.all_tied_weights_keys = {tensor: "another.weight"}
    with pytest.raises(ValueError, match=f"^{tensor} is offloaded and tied to another weight, so .*: load the model"):
        model_slim(offloaded)


def test_a_mapping_that_cannot_be_written_is_refused(name, tmp_path):
    model, _, _ = masked(name, tmp_path)
    kept = cpu_offload(model, execution_device=torch.device("cpu"), state_dict=MappingProxyType(model.state_dict()))
    with pytest.raises(ValueError, match=f"^{LAYERS[name]}.0.* is kept by a mappingproxy, where it cannot be changed"):
        model_slim(kept)


def test_tensors_without_values_are_refused(name):
    with torch.device("meta"):
        model = build(name)
    for function in (read_tensor, lambda model, tensor: find_zero_units(model, find_structures(model).structures)):
        with pytest.raises(
            ValueError, match=f"^{LAYERS[name]}.0.*weight is on the meta device, where .* load the model"
        ):
            function(model, find_structures(model).structures[0].outputs[0].tensor)
    with pytest.raises(ValueError, match=f"^{LAYERS[name]}.0.*weight is on the meta device, where .* load the model"):
        model_slim(model)


def test_saving_without_a_device_map_is_refused(name, tmp_path):
    """The `save_pretrained` of transformers then takes the tensors without values for the weights."""
    kept = cpu_offload(build(name), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded without a device_map, .*: load it with device_map"):
        save_slimmed(kept, tmp_path / "slim")
    assert not os.listdir(tmp_path)
