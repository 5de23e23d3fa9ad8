"""`audio_padding="longest"`: short clips are cheap in the encoder, and a batch trains as its items alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, WhisperConfig

from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForCTC
from soundwave.training.augment import SpecAugment
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def reader() -> SoundwaveForCTC:
    """An encoder of whisper-small's width and window with two of its layers, fp32."""
    audio = WhisperConfig(d_model=768, encoder_layers=2, encoder_attention_heads=12, encoder_ffn_dim=3072)
    text = LlamaConfig(hidden_size=32, num_attention_heads=4, vocab_size=60)
    config = SoundwaveConfig(audio_config=audio, text_config=text, audio_padding="longest")
    return SoundwaveForCTC._from_config(config, attn_implementation="eager").eval()  # its products are counted


def encoder_flops(reader, seconds: float, batch: int = 1) -> int:
    T = round(100 * seconds)
    features, mask = torch.randn(batch, 80, T), torch.ones(batch, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reader.encode(features, mask)
    return counter.get_total_flops()


def test_three_seconds_cost_at_most_a_fifth_of_thirty(reader):
    short, long = encoder_flops(reader, 3), encoder_flops(reader, 30)
    assert short <= long / 5
    assert 0.9 <= 2 * short / encoder_flops(reader, 3, batch=2) <= 1.1  # the counter sees the work


def losses_and_gradients(model, batch: dict, targets: list[list[int]]) -> dict[str, torch.Tensor]:
    """Sums over tokens, so that those of a batch are those of its items together."""
    model.zero_grad()
    width = max(map(len, targets))
    batch = batch | {
        "ctc_labels": torch.tensor([target + [0] * (width - len(target)) for target in targets]),
        "ctc_label_lengths": torch.tensor([len(target) for target in targets]),
    }
    out = model(**batch, num_items_in_batch=1, num_ctc_tokens=1)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"ce_loss": out.ce_loss.detach(), "ctc_loss": out.ctc_loss.detach()} | found


@given(st.lists(st.integers(4, 110), min_size=2, max_size=4), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_batch_trains_as_its_items_alone(lengths, trained_encoder, seed):
    """Padding in the windows, masked spans and bands included, changes neither loss nor any gradient."""
    model = tiny_model(alignment_dropout=0.0, shrinking_dropout=0.0)
    model.audio_tower.requires_grad_(trained_encoder)
    model.train()
    augment = SpecAugment(time_mask_width=20)
    audios = [augment(mel(frames, seed + i)[None], None, seed + i)[0] for i, frames in enumerate(lengths)]
    rows = [[3, audio, 5 + i, 9, 4 + i] for i, audio in enumerate(audios)]
    targets = [[5 + i, 9][: 1 + i % 2] for i in range(len(rows))]
    together = losses_and_gradients(model, batch_of(rows, labels=True), targets)
    alone = [
        losses_and_gradients(model, batch_of([row], labels=True), [target])
        for row, target in zip(rows, targets, strict=True)
    ]
    assert any(name.startswith("audio_tower.") for name in together) == trained_encoder
    for name, value in together.items():
        expected = sum(item[name] for item in alone if name in item)
        torch.testing.assert_close(
            value, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
