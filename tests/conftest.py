"""Tiny models of every family, and the real data where it is there."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when PyTorch and tokenizers are imported, here, in the workers and in the processes that tests start. Tiny
# models gain nothing from more threads, and threads that spin while they wait make them several times slower on a busy
# machine.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from loopback_hub import HubServer, running_hub  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from warm_python import WarmPython, running_python  # noqa: E402

from hf_slim.costs import forward_costs  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACK = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**STACK, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}

IMPORTED = ("datasets", "evaluate", "sentence_transformers", "matplotlib.pyplot", "ipykernel.kernelapp", "pytest")
"""What several of the scripts and commands import that tests run."""

FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**TEXT, **STACK}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**TEXT, **STACK}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, **STACK, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**TEXT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **TEXT,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, **GROUPED}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, **GROUPED}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**TEXT, **STACK, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **TEXT,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 48,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**TEXT, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0},
    ),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **TEXT,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 4,
            "d_kv": 8,
            "d_ff": 64,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**STACK, "image_size": 16, "patch_size": 4}),
}


forward_costs._MOST = forward_costs._FEWEST
"""Every save times a forward pass for its report: what is saved here need not be timed precisely."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Whole runs use the cores; for single files it would take longer to start the workers than to run the tests."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else min(os.cpu_count() or 1, 4)


def pytest_collection_finish() -> None:
    """Every training collects garbage twice; what the imports have made need not be looked at each time."""
    gc.freeze()


def build(family: str, seed: int = 0, spread: float = 0.3, **changes: object) -> PreTrainedModel:
    """A tiny model with weights large enough that every unit matters, in evaluation mode."""
    model_class, config_class, fields = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, spread)
    return model.eval()


def make_batch(model: PreTrainedModel, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two examples for a tiny model, with labels."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            "labels": torch.tensor([0, 1]),
        }
    ids = torch.randint(5, 99, (2, 7), generator=generator)
    if "SequenceClassification" in type(model).__name__:
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": ids}


def half_masks(structures, seed: int = 2, keep=lambda structure: structure.units // 2) -> dict[str, torch.Tensor]:
    """Random masks that keep half of the units of each structure."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randperm(s.units, generator=generator) < keep(s) for s in structures}


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model makes of a batch."""
    with torch.no_grad():
        return model(**batch).logits


def need_data(name: str) -> Path:
    """A folder of the real data, or a skipped test."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"the real data set {name} is not in {DATA}")
    return folder


@pytest.fixture
def blind_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery takes whatever has a known layout, so that a numerical proof is all that stands in the way."""
    for look in ("find_hook", "find_strange"):
        monkeypatch.setattr(f"hf_slim.structures.discovery.{look}", lambda model, path, structure: None)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def own_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts that a test registers are forgotten after it."""
    monkeypatch.setattr("hf_slim.structures.projection_names._registered", [])


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Runs scripts and commands in forks of a process that has imported everything; without a Hub."""
    environment = {"HF_HOME": str(tmp_path_factory.mktemp("home"))}
    with running_python(tmp_path_factory.mktemp("warm"), environment, IMPORTED) as python:
        yield python


@pytest.fixture(scope="session")
def hub_and_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, WarmPython]]:
    """A Hub on this machine, and the same for scripts that use it, whose address is read at importing."""
    with running_hub() as server:
        environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "mine"}
        with running_python(tmp_path_factory.mktemp("worker"), environment, ["datasets"]) as worker:
            yield server, worker


@pytest.fixture
def hub(hub_and_worker: tuple[HubServer, WarmPython]) -> HubServer:
    """An empty Hub on this machine."""
    hub_and_worker[0].reset()
    return hub_and_worker[0]


@pytest.fixture
def worker(hub_and_worker: tuple[HubServer, WarmPython]) -> WarmPython:
    """Runs scripts whose Hub is `hub`."""
    return hub_and_worker[1]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Every family in turn."""
    return request.param
