"""Installation of hf_slim."""

from pathlib import Path

from setuptools import find_packages, setup

PLOT = ["matplotlib"]
DOCS = ["sphinx>=8,<9", "myst-parser>=4,<6", "furo", *PLOT]
INTEGRATIONS = ["trl", "sentence-transformers>=6", "peft"]
LINTERS = ["ruff", "mypy", "pre-commit"]
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "nbclient", "ipykernel", *LINTERS]
OPTIMIZERS = ["bitsandbytes", "galore-torch", "grokadamw", "lomo-optim", "schedulefree", "torch-optimi"]
GGUF = ["gguf"]
ONNX = ["onnx", "onnxruntime", "onnxscript"]
TEST = [*TOOLS, *DOCS, *INTEGRATIONS, *OPTIMIZERS, *GGUF, *ONNX, "optuna", "tensorboard"]

setup(
    name="hf-slim",
    version="0.1.0",
    description="Makes transformer models smaller and faster while they are fine-tuned, as a plugin for the Trainer.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["hf_slim", "hf_slim.*"]), "hf_slim_command"],
    package_dir={"hf_slim_command": "hf_slim/cli/hf_slim_command"},
    package_data={"hf_slim": ["py.typed", "saving/templates/*", "cli/metrics/*/*.py"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5,<6",
        "accelerate>=1.7",
        "datasets>=4",
        "evaluate>=0.4.6",
        "psutil>=7.2",
        "rich",
        "typer",
    ],
    extras_require={
        "test": TEST,
        "docs": DOCS,
        "bench": PLOT,
        "plot": PLOT,
        "gguf": GGUF,
        "integrations": INTEGRATIONS,
        "deepspeed": ["deepspeed", "ninja"],
    },
    entry_points={"console_scripts": ["hf-slim = hf_slim_command:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
