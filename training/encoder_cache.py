"""The frozen encoder's features of every recording, computed once: a memory-mapped fp16 file and its index.

Stages I to III then never run the encoder. A folder belongs to one encoder (weights, configuration, padding);
recordings that are not in it yet are added, and a folder of another encoder is started anew.

Letters: `E` encoder frames (20 ms), `T` mel frames (10 ms), `D_e` encoder width.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from soundwave.processing import AudioError
from soundwave.processing.audio_soundwave import mel_frames, window_offsets
from soundwave.processing.frontends_soundwave import window_frames
from soundwave.training.incidents import report
from soundwave.training.stages import ConfigError

FEATURES, INDEX = "features.f16", "index.json"
CLIPS_AT_ONCE = 512  # decoded and sorted by length together
INDEX_EVERY_S = 300.0  # a build cut short keeps what it had encoded then
MEL_FRAMES_PER_BATCH = 12_000  # two minutes of audio in one forward pass
MEL_PER_ENCODER_FRAME = 2
MEL_PER_ALIGNED_FRAME = 4

Window = Sequence[int]  # first row in the file, rows, valid mel frames, offset in the recording in mel frames


def recording_key(recording: Mapping[str, Any]) -> str:
    """What identifies a recording: its bytes, or its file by path, size and time of change."""
    if recording.get("bytes") is not None:
        return hashlib.blake2b(recording["bytes"], digest_size=16).hexdigest()
    path = recording["path"]
    try:
        status = os.stat(path)
    except OSError:
        return path  # a URL; or a missing file, which decoding reports
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"


def encoder_fingerprint(model: torch.nn.Module, processor: Any) -> str:
    """Hash of all that the features depend on besides the recording."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config
    front_end = {
        k: v for k, v in processor.feature_extractor.to_dict().items() if isinstance(v, (int, float, str, bool))
    }
    audio = {k: v for k, v in config.audio_config.to_dict().items() if isinstance(v, (int, float, str, bool))}
    audio.pop("_name_or_path", None)
    settings = [audio, front_end, config.audio_padding, processor.audio_padding, config.mask_padding]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.audio_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class EncoderCache:
    """Encoder features by recording; `EncoderCache.build` makes one, `batch` reads it.

    Args:
        folder: where `build` put it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if index is None:
            raise ConfigError(f"{folder} holds no complete encoder cache; make it with EncoderCache.build.")
        self.fingerprint: str = index["fingerprint"]
        self.width: int = index["width"]
        self.clips: dict[str, list[Window]] = index["clips"]
        self.failed: dict[str, str] = index.get("failed", {})  # why a recording has no features
        self.features: np.ndarray = np.empty((0, self.width), np.float16)
        if index["rows"]:  # an empty file, where no recording could be read, cannot be mapped
            shape = (index["rows"], self.width)
            self.features = np.memmap(self.folder / FEATURES, np.float16, "r", shape=shape)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: torch.nn.Module,
        processor: Any,
        recordings: Iterable[dict[str, Any]],
        progress: bool = True,
    ) -> "EncoderCache":
        """Encode all distinct recordings that the folder does not hold yet; by one process, others open the result.

        One that cannot be read or encoded is noted in the index, and tried again by the next build.

        Args:
            folder: made if need be; emptied if it belongs to another encoder.
            model: any Soundwave model; its encoder runs in evaluation mode.
            processor: decodes and computes the encoder's features.
            recordings: `{"path", "bytes"}` each.
            progress: show a bar.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = encoder_fingerprint(model, processor)
        index = _read_index(folder)
        if index is None or index["fingerprint"] != fingerprint:
            # Before the features: a run cut short must not leave the old index beside what another encoder wrote.
            (folder / INDEX).unlink(missing_ok=True)
            width = model.config.encoder_width
            index = {"fingerprint": fingerprint, "width": width, "rows": 0, "clips": {}}
        index["failed"] = {}
        _append(folder, index, model, processor, _missing(recordings, set(index["clips"])), progress)
        return cls(folder)

    def windows(self, recording: Mapping[str, Any]) -> list[Window]:
        """Where the features of a recording lie.

        Raises:
            AudioError: for a recording that could not be encoded.
            ConfigError: for one that the cache does not know.
        """
        key = recording_key(recording)
        if key in self.failed:
            raise AudioError(self.failed[key])
        if key not in self.clips:
            raise ConfigError(
                f"the encoder cache {self.folder} lacks {recording.get('path') or 'a recording given as bytes'}; "
                "build it again, the file may have changed."
            )
        return self.clips[key]

    def batch(self, recordings: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The audio tensors of the model for some recordings, `encoder_features` (n_windows, E, D_e) in fp16.

        Raises:
            AudioError, ConfigError: as `windows`.
        """
        return self.features_of([self.windows(recording) for recording in recordings])

    def features_of(self, clips: Sequence[Sequence[Window]]) -> dict[str, torch.Tensor]:
        """The same for recordings given by their windows; one without rows in the file is silence."""
        windows = [window for clip in clips for window in clip]
        E = max(max(rows, mel // MEL_PER_ENCODER_FRAME) for _, rows, mel, _ in windows)
        features = np.zeros((len(windows), E, self.width), np.float16)
        valid = torch.tensor([mel for _, _, mel, _ in windows])
        for k, (first, rows, _, _) in enumerate(windows):
            features[k, :rows] = self.features[first : first + rows]
        return {
            "encoder_features": torch.from_numpy(features),
            "input_features_mask": torch.arange(E * MEL_PER_ENCODER_FRAME) < valid[:, None],  # (n_windows, T)
            "window_offsets": torch.tensor([offset for _, _, _, offset in windows]),
            "windows_per_audio": torch.tensor([len(clip) for clip in clips]),
        }


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index, or `None` when there is none that its features file bears out."""
    path, features = folder / INDEX, folder / FEATURES
    if not path.is_file() or not features.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    return index if features.stat().st_size >= index["rows"] * index["width"] * 2 else None


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    temporary = folder / (INDEX + ".partial")
    temporary.write_text(json.dumps(index), encoding="utf-8")
    os.replace(temporary, folder / INDEX)


def _missing(recordings: Iterable[dict[str, Any]], known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each recording that is not known, once; one by one, as their bytes may exceed the memory."""
    for recording in recordings:
        if (key := recording_key(recording)) not in known:
            known.add(key)
            yield key, recording


def _append(
    folder: Path,
    index: dict[str, Any],
    model: torch.nn.Module,
    processor: Any,
    missing: Iterator[tuple[str, dict[str, Any]]],
    progress: bool,
) -> None:
    """Write the features of the missing recordings, then the index: a run cut short leaves the last index valid."""
    device = next(model.audio_tower.parameters()).device
    was_training = model.training
    model.eval()
    size = index["rows"] * index["width"] * 2
    with open(folder / FEATURES, "ab") as file, torch.inference_mode():
        if file.tell() > size:
            file.truncate(size)  # what an unfinished run left behind the last index
        bar = tqdm(desc="encoding recordings", unit="clip", disable=not progress)
        tried, written = 0, time.monotonic()
        while part := list(itertools.islice(missing, CLIPS_AT_ONCE)):
            tried += len(part)
            chunk = []
            for key, clip in part:
                try:
                    chunk.append((key, processor.load_audio(clip)))
                except (AudioError, OSError) as error:
                    index["failed"][key] = str(error)
                    bar.update()
            chunk.sort(key=lambda pair: len(pair[1]))
            for group in _batches(chunk, processor):
                _encode_group(file, index, model, processor, group, device)
                bar.update(len(group))
            if time.monotonic() - written > INDEX_EVERY_S:
                file.flush()
                _write_index(folder, index)
                written = time.monotonic()
        bar.close()
    if index["failed"]:
        first = next(iter(index["failed"].values()))
        report(f"{len(index['failed'])} of {tried} recordings cannot be encoded, the first: {first}")
    model.train(was_training)
    _write_index(folder, index)


def _batches(clips: list[tuple[str, np.ndarray]], processor: Any) -> Iterable[list[tuple[str, np.ndarray]]]:
    """Runs of length-sorted clips whose windows have at most `MEL_FRAMES_PER_BATCH`, padding included."""
    window = window_frames(processor.feature_extractor)
    group: list[tuple[str, np.ndarray]] = []
    windows = 0
    for clip in clips:
        frames = mel_frames(len(clip[1]))
        own = len(window_offsets(frames, window))
        # This clip is the longest so far: every window of the batch is padded to its windows' length.
        padded = window if processor.audio_padding == "max_length" else min(frames, window)
        if group and (windows + own) * padded > MEL_FRAMES_PER_BATCH:
            yield group
            group, windows = [], 0
        group.append(clip)
        windows += own
    if group:
        yield group


def _encode_group(file: Any, index: dict, model: torch.nn.Module, processor: Any, group: list, device: Any) -> None:
    inputs = processor.audio_features([waveform for _, waveform in group])
    mask = inputs["input_features_mask"]
    encoded = model.encode(inputs["input_features"].to(device), mask.to(device))  # (n_windows, E, D_e)
    encoded = encoded.to(torch.float16).cpu()
    valid, position = mask.sum(dim=1).tolist(), 0
    for (key, _), count in zip(group, inputs["windows_per_audio"].tolist(), strict=True):
        if not bool(torch.isfinite(encoded[position : position + count]).all()):
            index["failed"][key] = "the encoder's features are not finite in fp16; train without encoder_cache."
            position += count
            continue
        windows = []
        for k in range(position, position + count):
            # Padding is kept only for models that let it count (the released layout).
            whole = -(-valid[k] // MEL_PER_ALIGNED_FRAME) * MEL_PER_ALIGNED_FRAME // MEL_PER_ENCODER_FRAME
            rows = whole if model.config.mask_padding else encoded.shape[1]
            windows.append([index["rows"], rows, valid[k], int(inputs["window_offsets"][k])])
            file.write(encoded[k, :rows].numpy().tobytes())
            index["rows"] += rows
        index["clips"][key] = windows
        position += count
