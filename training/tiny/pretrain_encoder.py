"""Stage 0a: a small Whisper-style encoder from nothing, by naming the phoneme and the word of every frame.

It stands in for Whisper. Dense targets are what makes minutes enough: with CTC alone an encoder of this size stays on
the blank plateau for longer than the whole budget (measured). Shapes: B batch, M mel bins, T mel frames (10 ms),
E encoder frames (20 ms), D_e encoder width.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave.training.tiny.utterances import CLIP

UNKNOWN = -1  # frames without a target
HOP, FFT = 160, 400  # samples: 10 ms and 25 ms


@dataclass(frozen=True)
class EncoderSettings:
    """Size and schedule of stage 0a."""

    d_model: int = 128
    layers: int = 3
    heads: int = 4
    ffn: int = 512
    mel_bins: int = 80
    positions: int = 1500  # 30 s, as Whisper
    steps: int = 5600
    frames_per_batch: int = 700  # padded encoder frames, about 7 utterances: many small steps beat few large ones
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.01
    word_weight: float = 1.0  # of the word loss beside the phoneme loss
    mel_masks: int = 1  # SpecAugment: number and largest width of the masks; more costs accuracy at this budget
    mel_mask_bins: int = 8
    time_masks: int = 1
    time_mask_frames: int = 8
    log_every: int = 100
    frame_accuracy_gate: float = 0.88

    @classmethod
    def smoke(cls) -> "EncoderSettings":
        """Return settings that take a second or two, for tests."""
        return cls(steps=12, frames_per_batch=600, warmup=4, log_every=4)


@dataclass
class _Clip:
    """Log-mel (M, T) with T = 2E, and the phoneme and word of its E frames."""

    mel: torch.Tensor
    phonemes: torch.Tensor
    words: torch.Tensor


def log_mel(samples: np.ndarray, extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """Return Whisper's log-mel spectrogram (M, T) of one clip of (n,) samples, T = 4 * ceil(n / 640).

    The clip is padded with zeros to a multiple of 640 samples and by one FFT window, and the frames of the latter are
    dropped, so that what follows a clip in a batch never reaches its last frames.
    """
    length = -(-len(samples) // CLIP) * CLIP
    padded = torch.zeros(length + FFT)
    padded[: len(samples)] = torch.as_tensor(samples, dtype=torch.float32)
    power = torch.stft(padded, FFT, HOP, window=torch.hann_window(FFT), return_complex=True).abs() ** 2
    filters = torch.as_tensor(extractor.mel_filters, dtype=torch.float32)  # (bins of the FFT, M)
    mel = (filters.T @ power[:, : length // HOP]).clamp(min=1e-10).log10()
    return (mel.maximum(mel.max() - 8) + 4) / 4


def encode(encoder: WhisperEncoder, mel: torch.Tensor, lengths: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return (B, E, D_e) for log-mels of several lengths, each as if it were alone.

    Args:
        encoder: Whisper's encoder, whose own forward insists on its full length and ignores masks.
        mel: (B, M, T), T even; beyond a clip's length it is set to zero here.
        lengths: (B,) valid mel frames, even.
        offset: position of the first frame; random in training, so that every position is learnt.
    """
    valid = torch.arange(mel.shape[-1]) < lengths[:, None]  # (B, T)
    hidden = F.gelu(encoder.conv1(mel * valid[:, None])) * valid[:, None]
    hidden = F.gelu(encoder.conv2(hidden)).transpose(1, 2)  # (B, E, D_e)
    frames = hidden.shape[1]
    hidden = hidden + encoder.embed_positions.weight[offset : offset + frames]
    mask = None if bool(valid.all()) else valid[:, None, None, ::2].expand(-1, 1, frames, -1)
    for layer in encoder.layers:
        hidden = layer(hidden, mask)
    return encoder.layer_norm(hidden)


class _Heads(nn.Module):
    """The encoder with one linear layer per kind of target; only the encoder is kept."""

    def __init__(self, encoder: WhisperEncoder, phonemes: int, words: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.phonemes = nn.Linear(encoder.config.d_model, phonemes)
        self.words = nn.Linear(encoder.config.d_model, words)

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = encode(self.encoder, mel, lengths, offset)
        return self.phonemes(hidden), self.words(hidden)


def load_clips(
    corpus: str | Path, extractor: WhisperFeatureExtractor
) -> tuple[dict[str, _Clip], dict[str, list[str]]]:
    """Return the labelled clips of a corpus by id, and the names of the phoneme and word classes."""
    import soundfile

    corpus = Path(corpus)
    classes = json.loads((corpus / "frames.json").read_text(encoding="utf-8"))
    frames = np.load(corpus / "frames.npz")
    ends = np.cumsum(frames["lengths"])
    phonemes, words = (torch.from_numpy(frames[name].astype(np.int64)) for name in ("phonemes", "words"))
    clips = {}
    for name, end, length in zip(frames["ids"].tolist(), ends, frames["lengths"], strict=True):
        samples, _ = soundfile.read(corpus / "wav" / f"{name}.wav", dtype="float32")
        mel = log_mel(samples, extractor)
        if mel.shape[1] != 2 * length:
            raise ValueError(f"{name}: {length} frame labels for {mel.shape[1]} mel frames; expected half as many")
        clips[name] = _Clip(mel, phonemes[end - length : end], words[end - length : end])
    return clips, classes


def _batches(clips: list[_Clip], frames_per_batch: int, rng: np.random.Generator) -> list[list[_Clip]]:
    """Return one epoch of batches of similar length, in random order."""
    jitter = rng.uniform(0.9, 1.1, len(clips))  # different neighbours each epoch
    order = sorted(range(len(clips)), key=lambda i: clips[i].mel.shape[1] * jitter[i])
    batches: list[list[_Clip]] = [[]]
    longest = 0
    for index in order:
        longest = max(longest, clips[index].mel.shape[1] // 2)
        if batches[-1] and longest * (len(batches[-1]) + 1) > frames_per_batch:
            batches.append([])
            longest = clips[index].mel.shape[1] // 2
        batches[-1].append(clips[index])
    return [batches[i] for i in rng.permutation(len(batches))]


def _collate(batch: list[_Clip]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mel (B, M, T), lengths (B,), phonemes and words (B, E)."""
    lengths = torch.tensor([clip.mel.shape[1] for clip in batch])
    longest = int(lengths.max())
    mel = torch.stack([F.pad(clip.mel, (0, longest - clip.mel.shape[1])) for clip in batch])
    phonemes = nn.utils.rnn.pad_sequence([clip.phonemes for clip in batch], True, UNKNOWN)
    words = nn.utils.rnn.pad_sequence([clip.words for clip in batch], True, UNKNOWN)
    return mel, lengths, phonemes, words


def _spec_augment(
    mel: torch.Tensor, lengths: torch.Tensor, settings: EncoderSettings, rng: np.random.Generator
) -> None:
    """Set bands and stretches of each log-mel to zero, in place."""
    for clip, length in zip(mel, lengths.tolist(), strict=True):
        for _ in range(settings.mel_masks):
            width = int(rng.integers(0, settings.mel_mask_bins + 1))
            start = int(rng.integers(0, mel.shape[1] - width + 1))
            clip[start : start + width] = 0
        for _ in range(settings.time_masks * max(1, length // 400)):
            width = min(int(rng.integers(0, settings.time_mask_frames + 1)), length // 4)
            start = int(rng.integers(0, length - width + 1))
            clip[:, start : start + width] = 0


@torch.no_grad()
def frame_accuracy(model: nn.Module, clips: list[_Clip], frames_per_batch: int) -> tuple[float, float]:
    """Return the share of frames whose phoneme and whose word the model names, silence included."""
    right, total = [0, 0], [0, 0]
    for batch in _batches(clips, frames_per_batch, np.random.default_rng(0)):
        mel, lengths, *targets = _collate(batch)
        for index, (scores, target) in enumerate(zip(model(mel, lengths), targets, strict=True)):
            known = target != UNKNOWN
            right[index] += int((scores.argmax(-1) == target)[known].sum())
            total[index] += int(known.sum())
    return right[0] / max(total[0], 1), right[1] / max(total[1], 1)


def new_encoder(settings: EncoderSettings) -> WhisperModel:
    """Return an untrained `WhisperModel` without decoder layers; what counts is its encoder."""
    config = WhisperConfig(
        d_model=settings.d_model,
        encoder_layers=settings.layers,
        encoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.ffn,
        num_mel_bins=settings.mel_bins,
        max_source_positions=settings.positions,
        decoder_layers=0,
        decoder_attention_heads=settings.heads,
        decoder_ffn_dim=8,
        max_target_positions=8,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperModel(config)


def cosine_rate(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """Return the learning-rate factor of a step: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))


def pretrain_encoder(
    corpus: str | Path,
    output: str | Path,
    settings: EncoderSettings | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> dict:
    """Train the encoder on a corpus folder and save it with its feature extractor.

    Args:
        corpus: folder with `wav/`, `frames.npz` and `frames.json`.
        output: folder to write, which `WhisperModel.from_pretrained` and `WhisperFeatureExtractor` read.
        settings: size and schedule.
        seed: of initialisation and batches.
        threads: processor threads; left alone if not given.
        progress: show a progress bar.

    Returns:
        Figures: steps, seconds, loss curve, accuracies on the development utterances, and whether the gate is passed.
    """
    settings, start = settings or EncoderSettings(), time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    extractor = WhisperFeatureExtractor(feature_size=settings.mel_bins, return_attention_mask=True)
    clips, classes = load_clips(corpus, extractor)
    training = [clip for name, clip in clips.items() if not name.startswith("dev_")]
    whisper = new_encoder(settings)
    model = _Heads(whisper.encoder, len(classes["phonemes"]), len(classes["words"]))
    trained = [p for p in model.parameters() if p.requires_grad]  # positions are sinusoids, as Whisper's
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True)
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    queue: list[list[_Clip]] = []
    bar = tqdm(range(settings.steps), desc="stage 0a, encoder", unit="step", disable=not progress)
    for step in bar:
        queue = queue or _batches(training, settings.frames_per_batch, rng)
        mel, lengths, phonemes, words = _collate(queue.pop())
        _spec_augment(mel, lengths, settings, rng)
        offset = int(rng.integers(0, settings.positions - mel.shape[-1] // 2 + 1)) if rng.random() < 0.7 else 0
        phoneme_scores, word_scores = model(mel, lengths, offset)
        loss = F.cross_entropy(phoneme_scores.flatten(0, 1), phonemes.flatten(), ignore_index=UNKNOWN)
        word_loss = F.cross_entropy(word_scores.flatten(0, 1), words.flatten(), ignore_index=UNKNOWN)
        loss = loss + settings.word_weight * word_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine_rate(step, settings.steps, settings.warmup)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % settings.log_every == 0:
            curve.append((step + 1, round(float(np.mean(losses)), 4)))
            losses = []
            bar.set_postfix(loss=curve[-1][1])
    accuracy = {}
    model.eval()
    for group in sorted({name.rsplit("_", 1)[0] for name in clips if name.startswith("dev_")}):
        chosen = [clip for name, clip in clips.items() if name.rsplit("_", 1)[0] == group]
        phoneme, word = frame_accuracy(model, chosen, settings.frames_per_batch)
        accuracy[group] = {"phoneme": round(phoneme, 4), "word": round(word, 4)}
    in_domain = [value["phoneme"] for group, value in accuracy.items() if "accent" not in group]
    whisper.save_pretrained(output)
    extractor.save_pretrained(output)
    figures = {
        "steps": settings.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in whisper.encoder.parameters()),
        "loss_curve": curve,
        "frame_accuracy": accuracy,
        "dev_frame_accuracy": round(float(np.mean(in_domain)), 4) if in_domain else None,
    }
    figures["gate"] = {"name": "frame accuracy", "at_least": settings.frame_accuracy_gate}
    figures["gate"]["passed"] = bool(in_domain) and figures["dev_frame_accuracy"] >= settings.frame_accuracy_gate
    (Path(output) / "pretraining.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return figures
