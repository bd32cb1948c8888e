"""The ways out of PyTorch and transformers: each takes a saved model and says how far its outputs are off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import transformers
from torch.export import Dim
from trainers import plain_model
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from way_models import FAMILIES, build_way_model, make_way_batch

from hf_slim import save_slimmed
from hf_slim.exports import export_gguf

Batch = dict[str, torch.Tensor]
_SLIM = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "slim_start": 1, "slim_end": 2, "slim_round_to": 8}
SLIMMING = {"dense": {}, "uniform": {**_SLIM, "slim_scope": "local"}, "non-uniform": _SLIM}
TEXTS = ["the cat sees the dog", "a child likes not the song, nor the river"]


class Subject(NamedTuple):
    """A saved model: its family, its folder, and the model that `from_pretrained` loads from it."""

    family: str
    folder: Path
    model: PreTrainedModel


class UnsupportedError(Exception):
    """A way that has no such kind of model, slim or not."""


# ------------------------------------------------------------------------------------------------- PyTorch itself


def torch_export(subject: Subject) -> float:
    """`torch.export` with dynamic batch and length."""
    model = _plain(subject.model)
    batch = make_way_batch(model)
    program = torch.export.export(model, (), batch, dynamic_shapes=_dynamic(batch, Dim.DYNAMIC), strict=False)
    run = program.module()
    return _compare(model, lambda other: run(**other).logits)


def torch_compile(subject: Subject) -> float:
    """`torch.compile` with inductor, dynamic shapes."""
    model = _plain(subject.model)
    run = torch.compile(copy.deepcopy(model), dynamic=True)
    return _compare(model, lambda other: run(**other).logits)


def torch_int8(subject: Subject) -> float:
    """Dynamic int8 of PyTorch: `torch.nn.Linear` alone, which is the head alone in GPT-2."""
    model = _plain(subject.model)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, torch.qint8)
    return _compare(model, lambda other: quantized(**other).logits)


# ------------------------------------------------------------------------------------------- exporters of transformers


def by_transformers(backend: str) -> Callable[[Subject], float]:
    """An exporter of transformers, dynamic, and its runner."""

    def way(subject: Subject) -> float:
        from transformers import exporters

        model = _plain(subject.model)
        exporter = getattr(exporters, f"{backend}Exporter")()
        exported = exporter.export(
            model, make_way_batch(model), exporter.config_class(dynamic=backend != "Executorch")
        )
        if backend == "OpenVINO":
            exported.to(config={"INFERENCE_PRECISION_HINT": "f32"})
        return _compare(model, lambda other: exported(**other).logits, dynamic=backend != "Executorch")

    way.__doc__ = f"`{backend}Exporter` of transformers."
    return way


# ------------------------------------------------------------------------------------------------ ONNX and onnxruntime


def export_onnx(model: PreTrainedModel, path: Path) -> Path:
    """Write an ONNX file by `torch.onnx`, dynamic batch and length."""
    batch = make_way_batch(model)
    names = {0: "batch", 1: "length"}
    torch.onnx.export(
        model,
        (),
        path,
        kwargs=batch,
        dynamo=True,
        dynamic_shapes=_dynamic(batch, names),
        output_names=["logits"],
        verbose=False,
    )
    return path


def export_onnx_by_transformers(model: PreTrainedModel, path: Path) -> Path:
    """Write an ONNX file by `OnnxExporter`, dynamic batch and length."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    OnnxExporter().export(model, make_way_batch(model), OnnxConfig(dynamic=True)).save_pretrained(path.parent)
    return path


def run_onnx(path: Path) -> Callable[[Batch], torch.Tensor]:
    """Load an ONNX file into onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])

    return run


def onnx_by_torch(subject: Subject) -> float:
    """`torch.onnx.export` and onnxruntime."""
    model = _plain(subject.model)
    return _compare(model, run_onnx(export_onnx(model, subject.folder / "model.onnx")))


def onnx_int8(subject: Subject) -> float:
    """`quantize_dynamic` of onnxruntime."""
    model = _plain(subject.model)
    path = export_onnx(model, subject.folder / "model.onnx")
    return _compare(model, run_onnx(quantize_onnx(path, subject.folder / "int8.onnx")))


def quantize_onnx(path: Path, out: Path) -> Path:
    """Write an ONNX file with weights in int8."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(path, out)
    return out


# ------------------------------------------------------------------------------------------------------------ OpenVINO


def run_openvino(path: Path, int8: bool = False) -> Callable[[Batch], torch.Tensor]:
    """Load an ONNX file into OpenVINO, computing in float32."""
    import openvino

    converted = openvino.convert_model(path)
    if int8:
        import nncf

        converted = nncf.compress_weights(converted)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(converted, "CPU", settings)
    names = [entry.get_any_name() for entry in compiled.inputs]
    return lambda batch: torch.from_numpy(np.array(compiled({name: batch[name].numpy() for name in names})[0]))


def openvino_by_onnx(subject: Subject) -> float:
    """`openvino.convert_model` of the ONNX file."""
    model = _plain(subject.model)
    return _compare(model, run_openvino(export_onnx(model, subject.folder / "model.onnx")))


def openvino_int8(subject: Subject) -> float:
    """`nncf.compress_weights` of it."""
    model = _plain(subject.model)
    return _compare(model, run_openvino(export_onnx(model, subject.folder / "model.onnx"), int8=True))


# ---------------------------------------------------------------------------------------------------------- ExecuTorch


def executorch(subject: Subject) -> float:
    """ExecuTorch with XNNPACK, of fixed shape."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model = _plain(subject.model)
    batch = make_way_batch(model)
    program = torch.export.export(model, (), batch, strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    return _compare(model, lambda other: method.execute(list(other.values()))[0], dynamic=False)


# -------------------------------------------------------------------------------------------------------- quantization


def by_quantization_config(make: Callable[[], Any]) -> Callable[[Subject], float]:
    """`from_pretrained` with a `quantization_config`."""

    def way(subject: Subject) -> float:
        auto = getattr(transformers, FAMILIES[subject.family].auto_class)
        kinds = {type(module).__name__ for module in subject.model.modules()}
        quantized = auto.from_pretrained(
            subject.folder, quantization_config=make(), dtype=torch.float32, device_map="cpu"
        ).eval()
        weights = {type(p.data).__name__ for p in quantized.parameters()} - {"Parameter", "Tensor"}
        if not weights and {type(module).__name__ for module in quantized.modules()} == kinds:
            raise UnsupportedError("nothing in it is quantized: it knows torch.nn.Linear, GPT-2 has Conv1D")
        return _compare(subject.model, lambda other: quantized(**other).logits)

    return way


def torchao_int8() -> TorchAoConfig:
    """Int8 weights by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def eight_bits() -> BitsAndBytesConfig:
    """Eight bits by bitsandbytes."""
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bits() -> BitsAndBytesConfig:
    """Four bits by bitsandbytes, but for the heads, whose widths are whatever they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "lm_head"],
    )


# -------------------------------------------------------------------------------------------------------- transformers


def pipeline(subject: Subject) -> float:
    """`pipeline` of the family's task."""
    tasks = {"BERT": "text-classification", "ViT": "image-classification"}
    if subject.family == "T5":
        raise UnsupportedError("transformers 5 has no pipeline for it")
    run = transformers.pipeline(tasks.get(subject.family, "text-generation"), str(subject.folder), device="cpu")
    if subject.family == "ViT":
        image = PIL.Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
        batch = transformers.AutoImageProcessor.from_pretrained(subject.folder)(image, return_tensors="pt")
        found = {entry["label"]: entry["score"] for entry in run(image)}
    elif subject.family == "BERT":
        batch = _encode(subject, TEXTS[:1])
        found = {entry["label"]: entry["score"] for entry in run(TEXTS[0], top_k=None)}
    else:
        batch = _encode(subject, TEXTS[:1])
        expected = subject.model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
        found = run(TEXTS[0], max_new_tokens=8, do_sample=False, eos_token_id=None, return_tensors=True)
        _check_same(found[0]["generated_token_ids"], expected[0].tolist())
        return 0.0
    with torch.no_grad():
        scores = subject.model(**batch).logits.softmax(-1)[0]
    return max(abs(found[label] - float(scores[number])) for number, label in subject.model.config.id2label.items())


def generate_batch(subject: Subject) -> float:
    """Continuous batching."""
    _need_causal(subject)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = subject.model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=sizes, warmup=False
    )
    for prompt, output in zip(prompts, found.values(), strict=True):
        ids = torch.tensor([prompt])
        expected = subject.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        _check_same(output.generated_tokens, expected[0, len(prompt) :].tolist())
    return 0.0


def stock_config(subject: Subject) -> float:
    """What vLLM and TGI take: a config whose plain fields say all sizes."""
    fields = subject.model.config.to_dict()
    if "hf_slim" in fields:
        raise ValueError("the config has a shape record, which they do not read")
    if fields.get("per_layer_config"):
        raise ValueError("the config has per_layer_config, which they do not read")
    return 0.0


def llama_cpp(subject: Subject) -> float:
    """`export_gguf` and llama.cpp, weights in float16."""
    return _compare_gguf(subject, subject.model)


def llama_cpp_to_rounded(subject: Subject) -> float:
    """The same, to the model whose matrices have been rounded to float16 as those of the file are."""
    return _compare_gguf(subject, round_matrices(subject.model))


@torch.no_grad()
def round_matrices(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose matrices have been rounded to float16."""
    rounded = copy.deepcopy(model)
    for weight in rounded.parameters():
        if weight.dim() == 2:
            weight.copy_(weight.half())
    return rounded


def run_llama_cpp(path: Path, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The logits that llama.cpp computes of one text."""
    import llama_cpp

    loaded = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, logits_all=True, n_threads=1, verbose=False, **settings)
    loaded.eval(ids.tolist())
    found = torch.from_numpy(np.array(loaded.scores[: len(ids)]))
    loaded.close()
    return found


def _compare_gguf(subject: Subject, expected: PreTrainedModel) -> float:
    path = export_gguf(subject.folder, subject.folder / "model.gguf")
    batch = make_way_batch(subject.model, 1, 20)
    found = run_llama_cpp(path, batch["input_ids"][0])
    with torch.no_grad():
        return float((found - expected(**batch).logits[0]).abs().max())


# ----------------------------------------------------------------------------------------------- sentence-transformers


def sentence_transformer(subject: Subject) -> float:
    """`SentenceTransformer` with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    _need_text(subject)
    body = Transformer(str(subject.folder))
    encoder = SentenceTransformer(modules=[body, Pooling(256, "mean")], device="cpu")
    text_encoder = transformers.AutoModelForTextEncoding if subject.family == "T5" else transformers.AutoModel
    base = text_encoder.from_pretrained(subject.folder).eval()
    batch = _encode(subject, TEXTS)
    with torch.no_grad():
        weights = batch["attention_mask"].unsqueeze(-1)
        expected = (base(**batch).last_hidden_state * weights).sum(1) / weights.sum(1)
    return float((encoder.encode(TEXTS, convert_to_tensor=True) - expected).abs().max())


def cross_encoder(subject: Subject) -> float:
    """`CrossEncoder` with a classification head."""
    from sentence_transformers import CrossEncoder

    _need_text(subject)
    folder = _save_as("AutoModelForSequenceClassification", subject)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    second = TEXTS[1] + _tokenizer(subject).eos_token  # at which T5 classifies
    pair = _tokenizer(subject)(TEXTS[0], second, return_tensors="pt")
    inputs = {name: pair[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs).logits[0]
    scores = CrossEncoder(str(folder), device="cpu").predict(
        [(TEXTS[0], second)], activation_fn=torch.nn.Identity(), convert_to_tensor=True
    )
    return float((scores - expected).abs().max())


def sparse_encoder(subject: Subject) -> float:
    """`SparseEncoder` with a masked-language head."""
    from sentence_transformers import SparseEncoder

    _need_text(subject)
    if subject.family != "BERT":
        raise UnsupportedError("no masked language model")
    folder = _save_as("AutoModelForMaskedLM", subject)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    batch = _encode(subject, TEXTS)
    with torch.no_grad():
        scores = model(**batch).logits.relu().log1p() * batch["attention_mask"].unsqueeze(-1)
    found = SparseEncoder(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True).to_dense()
    return float((found - scores.amax(1)).abs().max())


# ----------------------------------------------------------------------------------------------------------------- TRL


def by_trl(make: Callable[..., Any]) -> Callable[[Subject], float]:
    """Slimming in a trainer of TRL, whose reference model stays whole, and the model saved and loaded again."""

    def way(subject: Subject) -> float:
        _need_causal(subject)
        base = subject.folder / "base"
        model = build_way_model(subject.family)
        model.save_pretrained(base)
        trainer = make(subject.folder / "trl", base, **SLIMMING[subject.folder.name])
        trainer.train()
        if trainer.ref_model.num_parameters() != model.num_parameters():
            raise AssertionError("the reference model was slimmed, too")
        if subject.folder.name == "dense":
            trainer.model.save_pretrained(subject.folder / "trained")
        else:
            save_slimmed(trainer, subject.folder / "trained")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(subject.folder / "trained").eval()
        if subject.folder.name != "dense" and not loaded.num_parameters() < model.num_parameters():
            raise AssertionError("nothing was removed")
        batch = make_way_batch(model)
        with torch.no_grad():
            return float((loaded(**batch).logits - plain_model(trainer)(**batch).logits).abs().max())

    return way


# ---------------------------------------------------------------------------------------------------------- comparison


def _check_same(found: list[int], expected: list[int]) -> None:
    if list(found) != list(expected):
        raise AssertionError(f"tokens {list(found)}, not {list(expected)}")


def _tokenizer(subject: Subject) -> Any:
    return transformers.AutoTokenizer.from_pretrained(subject.folder)


def _encode(subject: Subject, texts: list[str]) -> Batch:
    found = _tokenizer(subject)(texts, return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _need_text(subject: Subject) -> None:
    if subject.family == "ViT":
        raise UnsupportedError("no text model")


def _need_causal(subject: Subject) -> None:
    if "CausalLM" not in FAMILIES[subject.family].auto_class:
        raise UnsupportedError("no causal language model")


def _save_as(auto_class: str, subject: Subject) -> Path:
    """Save the model with another head, whose weights are new."""
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_pretrained(subject.folder, dtype=torch.float32)
    folder = subject.folder / auto_class
    model.save_pretrained(folder)
    _tokenizer(subject).save_pretrained(folder)
    return folder


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model without a cache of keys and values, which would be another output."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.use_cache = False
    return model


def _dynamic(batch: Batch, dims: Any) -> dict[str, Any]:
    """Dynamic batch, and length where the input has one."""
    if isinstance(dims, Mapping):
        return {name: {0: dims[0]} if tensor.dim() == 4 else dict(dims) for name, tensor in batch.items()}
    return {name: {0: dims} if tensor.dim() == 4 else {0: dims, 1: dims} for name, tensor in batch.items()}


@torch.no_grad()
def _compare(model: PreTrainedModel, run: Callable[[Batch], Any], dynamic: bool = True) -> float:
    """The greatest difference, on another batch and length than those of the export where it is dynamic."""
    batches = [make_way_batch(model), make_way_batch(model, 3, 17)] if dynamic else [make_way_batch(model)]
    worst = 0.0
    for batch in batches:
        expected, found = model(**batch).logits, torch.as_tensor(run(batch))
        if found.shape != expected.shape:
            raise AssertionError(f"outputs of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        difference = float((found.float() - expected).abs().max())
        if not np.isfinite(difference):
            raise AssertionError("outputs that are not finite")
        worst = max(worst, difference)
    return worst
