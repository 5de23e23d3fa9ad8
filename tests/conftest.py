"""What every test shares: no network, one thread, a fixed order of hypothesis examples, and a tiny random model.

The model has the real classes at toy sizes: Whisper's encoder and Llama with 2 layers each, and a tokenizer of some
hundred pieces (`tests/components.py`). Fixtures are made once per process; a test that trains or edits one copies it.
"""

import os

# Read when the libraries are imported, so before any of them is.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from tests.components import save_encoder, save_llm

# The same examples on every run and machine; a slow shared machine is no failure.
hypothesis.settings.register_profile("soundwave", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("soundwave")

SAMPLING_RATE = 16_000
SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_make_parametrize_id(val, argname):
    """Encoded audio holds the time it was made at: as a test's name it would differ between two test processes."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _deterministic():
    """Seed, and keep to one thread: tests run side by side and the tensors are tiny."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Recorded clips beside the checkout; not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"recorded clips are not at ../{SHARED_DATA.parent.name}/{SHARED_DATA.name}")
    return SHARED_DATA


def tone(seconds: float, frequency_hz: float = 440.0, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Return (n,) float32 samples of a tone at a tenth of full scale."""
    time_s = np.arange(round(seconds * sampling_rate)) / sampling_rate
    return (0.1 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> str:
    """A random Whisper encoder with a window of 2 s, saved."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory) -> str:
    """A random Llama with its tokenizer, saved."""
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def processor(encoder_folder, llm_folder) -> SoundwaveProcessor:
    """The processor of the two components."""
    return SoundwaveProcessor.from_components(encoder_folder, llm_folder, audio_padding="longest")


@pytest.fixture(scope="session")
def tiny_model(encoder_folder, llm_folder, processor) -> SoundwaveForConditionalGeneration:
    """A random model over the two components, fp32, in evaluation mode. Copy it before changing it."""
    torch.manual_seed(2)
    return SoundwaveForConditionalGeneration.from_components(
        encoder_folder, llm_folder, audio_token_id=processor.audio_token_id, audio_padding="longest"
    )


@pytest.fixture(scope="session")
def tiny_ctc(encoder_folder, llm_folder, processor) -> SoundwaveForCTC:
    """The same without an LLM. Copy it before changing it."""
    torch.manual_seed(2)
    return SoundwaveForCTC.from_components(
        encoder_folder, llm_folder, audio_token_id=processor.audio_token_id, audio_padding="longest"
    )


@pytest.fixture(scope="session")
def peers(tmp_path_factory):
    """Folder of a tiny model of another family, by name, made when it is first asked for."""
    from tests import tiny_audio_models  # imports many models, which few tests need

    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> str:
        if name == "voxtral" and find_spec("mistral_common") is None:
            pytest.skip("Voxtral's tokenizer needs mistral-common")
        if not (root / name).is_dir():
            getattr(tiny_audio_models, f"save_{name}")(root / name)
        return str(root / name)

    return folder
