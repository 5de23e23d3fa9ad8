"""Packaging. The repository's folders are installed below one name: `training` is imported as `soundwave.training`."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "soundwave" / "__init__.py").read_text(), re.MULTILINE).group(1)

# Installed name -> folder.
PACKAGES = {
    "soundwave": "soundwave",
    "soundwave.modeling_soundwave": "modeling_soundwave",
    "soundwave.processing": "processing",
    "soundwave.training": "training",
    "soundwave.training.tiny": "training/tiny",
    "soundwave.eval": "eval",
    "soundwave.eval.benchmarks": "eval/benchmarks",
    "soundwave.eval.metrics": "eval/metrics",
    "soundwave.eval.models": "eval/models",
    "soundwave.model_card": "model_card",
    "soundwave.apps": "apps",
    "soundwave.apps.server": "apps/server",
    "soundwave.assets": "assets",
}

REQUIRED = [
    # torchaudio's last release is built for CUDA 13.0, which torch left with 2.15: importing it beside that fails.
    "torch>=2.11,<2.15",
    "torchaudio>=2.11",
    "transformers>=5.23",
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "huggingface_hub>=2.4",
    "peft>=0.21",
    "trl>=1.16",
    "safetensors>=0.8",
    "jinja2>=3.1",
    "numpy>=2.0",
    "pyyaml>=6.0",
    "soundfile>=0.13",
    "tqdm>=4.66",
]

EVAL = ["jiwer>=4.0", "matplotlib>=3.9", "openai>=2.0", "sacrebleu>=2.6"]
TRAIN = [*EVAL, "tensorboard>=2.20"]  # live curves, the report's pictures, scored validation
# espeakng-loader carries espeak-ng (GPL-3.0): a tool of the tiny preset, never imported by the library.
TINY = [*EVAL, "espeakng-loader>=0.2.4", "soxr>=1.0"]
SERVE = ["transformers[serving]>=5.23", "python-multipart>=0.0.20"]
QUANTIZE = ["torchao>=0.18"]  # int8 weights of the LLM
QLORA = ["bitsandbytes>=0.46.1"]  # training over an LLM in 4 bit
DEV = [
    *TRAIN,
    *TINY,
    *SERVE,
    *QUANTIZE,
    "hypothesis>=6.100",
    "mistral-common>=1.13",  # Voxtral's tokenizer
    "mypy>=2.0",
    "pytest>=9.0",
    "pytest-xdist>=3.6",
    "ruff==0.17.5",
    "setuptools>=65",
]

setup(
    name="soundwave",
    version=VERSION,
    description="A speech LLM: align speech with text, shrink it, follow instructions",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "soundwave.training": ["configs/**/*.yaml", "launch/*"],
        "soundwave.eval": ["published.json"],
        "soundwave.eval.metrics": ["*/*.py"],
        "soundwave.model_card": ["*.md"],
        "soundwave.assets": ["tiny/*"],
    },
    zip_safe=False,
    install_requires=REQUIRED,
    extras_require={
        "eval": EVAL,
        "train": TRAIN,
        "tiny": TINY,
        "serve": SERVE,
        "quantize": QUANTIZE,
        "qlora": QLORA,
        "demo": ["gradio>=6.31"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["soundwave = soundwave.apps.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
