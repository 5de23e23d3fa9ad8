"""Rows to the tensors of the contract, with audio or with the cached features of the encoder."""

import copy
import shutil

import numpy as np
import pytest
import torch

from soundwave.processing import AudioError
from soundwave.training import encoder_cache
from soundwave.training.collator import IGNORED, BadRow, SoundwaveCollator
from soundwave.training.data import load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache, encoder_fingerprint, recording_key
from soundwave.training.stages import ConfigError
from tests.processors import make_processor
from tests.training_rows import write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_rows(write_rows(tmp_path_factory.mktemp("rows")))


def clips_of(rows):
    return [clip for row in rows for clip in recordings(row)]


def test_prompts_are_padded_on_the_left_and_only_answers_are_learned(rows, processor):
    chosen = [rows[0], rows[11], rows[9]]  # spoken, written, long
    batch = SoundwaveCollator(processor)(chosen)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for k, row in enumerate(chosen):
        prompt, answer = processor.prompt_and_answer_ids(processor.example_messages(row))
        ids = batch["input_ids"][k][batch["attention_mask"][k].bool()].tolist()
        assert ids == prompt + answer
        assert batch["attention_mask"][k, -1] == 1
        learned = batch["labels"][k] != IGNORED
        assert batch["labels"][k][learned].tolist() == answer == batch["input_ids"][k][learned].tolist()
        assert learned[-len(answer) :].all() and learned.sum() == len(answer)
    assert (batch["input_ids"] == processor.audio_token_id).sum() == 2
    assert batch["windows_per_audio"].tolist() == [1, 2]  # 3 s do not fit the window of 2 s


def test_ctc_targets(rows, processor):
    pair = {**rows[1], "audio": [*recordings(rows[1])] * 2, "transcript": ["red boxes", None]}
    chosen = [rows[9], rows[0], pair]
    batch = SoundwaveCollator(processor, losses=("ctc",))(chosen)
    assert batch.keys() == {
        "input_features",
        "input_features_mask",
        "window_offsets",
        "windows_per_audio",
        "ctc_labels",
        "ctc_label_lengths",
    }
    ids = processor.ctc_label_ids("red boxes")
    assert batch["ctc_label_lengths"].tolist() == [0, len(ids), len(ids), -1]  # nothing is said; words; not known
    assert batch["ctc_labels"][1, : len(ids)].tolist() == ids
    silent = SoundwaveCollator(processor, losses=("ctc",))([rows[9]])
    assert silent["ctc_labels"].shape == (1, 1) and silent["ctc_label_lengths"].tolist() == [0]


def test_losses_and_rows_decide_what_is_there(rows, processor):
    answers = SoundwaveCollator(processor, losses=("answer",))([rows[0]])
    assert "ctc_labels" not in answers and "input_features" in answers
    written = SoundwaveCollator(processor)([rows[10], rows[11]])
    assert written.keys() == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(BadRow, match="'t0'.*no audio"):
        SoundwaveCollator(processor, losses=("ctc",))([rows[10]])
    with pytest.raises(BadRow, match="'s0' has no answer"):
        SoundwaveCollator(processor)([{**rows[0], "answer": None}])


def test_several_recordings_and_conversations_in_a_row(rows, processor):
    first, second = recordings(rows[0])[0], recordings(rows[1])[0]
    pair = {**rows[0], "audio": [first, second], "transcript": ["red boxes", None]}
    turns = [
        {"role": "user", "content": [{"type": "audio", "text": None}, {"type": "text", "text": "and?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    talk = {**rows[0], "audio": [first], "transcript": [None], "messages": turns, "answer": None}
    batch = SoundwaveCollator(processor)([pair, talk])
    assert (batch["input_ids"] == processor.audio_token_id).sum(dim=1).tolist() == [2, 1]
    assert batch["windows_per_audio"].tolist() == [1, 1, 1]
    assert batch["ctc_label_lengths"].tolist()[1:] == [-1, -1]
    answer = batch["labels"][1][batch["labels"][1] != IGNORED]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == "yes"


def test_the_model_takes_the_batch(rows, processor, tiny_model, tiny_ctc):
    with torch.no_grad():
        mixed = tiny_model(**SoundwaveCollator(processor)([rows[k] for k in (0, 5, 9, 10)]))
        assert torch.isfinite(mixed.loss) and mixed.audio_positions.shape == (3,)
        assert torch.isfinite(tiny_model(**SoundwaveCollator(processor)([rows[10]])).loss)
        aligned = tiny_ctc(**SoundwaveCollator(processor, losses=("ctc",))([rows[k] for k in range(10)]))
        assert torch.isfinite(aligned.loss) and len(aligned.token_ids) == 10


def test_cached_features_equal_those_of_the_encoder(rows, processor, tiny_model, tmp_path):
    cache = EncoderCache.build(tmp_path, tiny_model, processor, clips_of(rows), progress=False)
    assert len(cache.clips) == 10
    chosen = [rows[k] for k in (9, 0, 4, 10)]
    plain, cached = SoundwaveCollator(processor)(chosen), SoundwaveCollator(processor, cache=cache)(chosen)
    assert cached["encoder_features"].dtype == torch.float16
    for name in ("window_offsets", "windows_per_audio", "input_ids", "ctc_labels"):
        assert torch.equal(plain[name], cached[name]), name
    assert torch.equal(plain["input_features_mask"].sum(1), cached["input_features_mask"].sum(1))
    cached["encoder_features"] = cached["encoder_features"].float()
    with torch.no_grad():
        one, two = tiny_model(**plain), tiny_model(**cached)
    assert torch.allclose(one.ctc_loss, two.ctc_loss, rtol=1e-2)
    assert torch.allclose(one.ce_loss, two.ce_loss, rtol=1e-2)


def test_a_cache_is_reused_added_to_and_rebuilt(rows, processor, tiny_model, tiny_ctc, tmp_path):
    clips = clips_of(rows)
    EncoderCache.build(tmp_path, tiny_model, processor, clips[:4], progress=False)
    first = (tmp_path / "features.f16").read_bytes()
    # The same encoder in another model adds what is missing and leaves the rest.
    assert encoder_fingerprint(tiny_model, processor) == encoder_fingerprint(tiny_ctc, processor)
    cache = EncoderCache.build(tmp_path, tiny_ctc, processor, clips, progress=False)
    assert len(cache.clips) == 10
    second = (tmp_path / "features.f16").read_bytes()
    assert second[: len(first)] == first and len(second) > len(first)
    changed = (tmp_path / "features.f16").stat().st_mtime_ns
    EncoderCache.build(tmp_path, tiny_ctc, processor, clips, progress=False)
    assert (tmp_path / "features.f16").stat().st_mtime_ns == changed
    # What an unfinished run left behind the index is cut off.
    with open(tmp_path / "features.f16", "ab") as file:
        file.write(b"rest")
    extra = {"path": None, "bytes": open(clips[0]["path"], "rb").read()}
    cache = EncoderCache.build(tmp_path, tiny_ctc, processor, [extra], progress=False)
    bytes_first, path_first = (cache.batch([clip])["encoder_features"] for clip in (extra, clips[0]))
    assert torch.equal(bytes_first, path_first) and recording_key(extra) != recording_key(clips[0])
    # Another encoder starts anew.
    other = copy.deepcopy(tiny_ctc)
    with torch.no_grad():
        other.audio_tower.conv1.bias += 1
    assert len(EncoderCache.build(tmp_path, other, processor, clips[:2], progress=False).clips) == 2
    with pytest.raises(ConfigError, match="lacks"):
        EncoderCache(tmp_path).batch(clips[5:6])
    with pytest.raises(ConfigError, match="no complete encoder cache"):
        EncoderCache(tmp_path / "absent")


def test_a_killed_rebuild_leaves_no_index_of_foreign_features(rows, processor, tiny_ctc, tmp_path, monkeypatch):
    clips = clips_of(rows)
    before = EncoderCache.build(tmp_path, tiny_ctc, processor, clips[:2], progress=False).batch(clips[:2])
    other = copy.deepcopy(tiny_ctc)
    with torch.no_grad():
        other.audio_tower.conv1.bias += 1
    monkeypatch.setattr(encoder_cache, "CLIPS_AT_ONCE", 4)
    load = processor.load_audio

    def interrupted(clip):
        if clip == clips[6]:
            raise KeyboardInterrupt
        return load(clip)

    monkeypatch.setattr(processor, "load_audio", interrupted)
    with pytest.raises(KeyboardInterrupt):
        EncoderCache.build(tmp_path, other, processor, clips[2:7], progress=False)
    monkeypatch.undo()
    assert (tmp_path / "features.f16").stat().st_size > before["encoder_features"].numel() * 2
    with pytest.raises(ConfigError, match="no complete encoder cache"):
        EncoderCache(tmp_path)
    again = EncoderCache.build(tmp_path, tiny_ctc, processor, clips[:2], progress=False).batch(clips[:2])
    assert torch.equal(again["encoder_features"], before["encoder_features"])


def test_a_killed_build_keeps_what_its_last_index_holds(rows, processor, tiny_ctc, tmp_path, monkeypatch):
    clips = clips_of(rows)
    monkeypatch.setattr(encoder_cache, "CLIPS_AT_ONCE", 2)
    monkeypatch.setattr(encoder_cache, "INDEX_EVERY_S", 0.0)
    load, heard = processor.load_audio, []

    def interrupted(clip):
        if clip == clips[5]:
            raise KeyboardInterrupt
        heard.append(clip)
        return load(clip)

    monkeypatch.setattr(processor, "load_audio", interrupted)
    with pytest.raises(KeyboardInterrupt):
        EncoderCache.build(tmp_path, tiny_ctc, processor, iter(clips[:6]), progress=False)
    monkeypatch.setattr(processor, "load_audio", lambda clip: heard.append(clip) or load(clip))
    again = EncoderCache.build(tmp_path, tiny_ctc, processor, iter(clips[:6]), progress=False)
    assert heard == [*clips[:5], clips[4], clips[5]]  # the pair that was under way, once more
    whole = EncoderCache.build(tmp_path / "whole", tiny_ctc, processor, iter(clips[:6]), progress=False)
    assert torch.equal(again.batch(clips[:6])["encoder_features"], whole.batch(clips[:6])["encoder_features"])


def test_a_recording_that_cannot_be_read_stays_out_of_a_cache(rows, processor, tiny_ctc, tmp_path, capsys):
    clips = clips_of(rows)
    broken = {"path": str(tmp_path / "broken.wav"), "bytes": None}
    remote = {"path": "https://127.0.0.1:9/a.wav", "bytes": None}
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    folder = tmp_path / "cache"
    cache = EncoderCache.build(folder, tiny_ctc, processor, [broken, remote], progress=False)
    assert not cache.clips and len(cache.failed) == 2
    assert "2 of 2 recordings cannot be encoded, the first:" in capsys.readouterr().err
    with pytest.raises(AudioError, match="broken.wav"):
        cache.windows(broken)
    with pytest.raises(BadRow, match="no public address"):
        SoundwaveCollator(processor, ("ctc",), cache)([{**rows[0], "audio": remote}])
    # Mended, it is encoded by the next build, and what still fails does not undo the rest.
    shutil.copyfile(clips[0]["path"], broken["path"])
    cache = EncoderCache.build(folder, tiny_ctc, processor, [broken, remote, clips[0]], progress=False)
    assert len(cache.clips) == 2 and list(cache.failed) == [remote["path"]]
    one, two = (cache.batch([clip])["encoder_features"] for clip in (broken, clips[0]))
    assert torch.equal(one, two) and one.any()
    # Nor does one that the encoder makes infinities of.
    loud = copy.deepcopy(tiny_ctc)
    with torch.no_grad():
        loud.audio_tower.layer_norm.weight *= 1e6
    cache = EncoderCache.build(folder, loud, processor, clips[:1], progress=False)
    assert "not finite in fp16" in cache.failed[recording_key(clips[0])] and not cache.clips


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_encoder_batches_are_bounded_with_their_padding(padding, monkeypatch):
    monkeypatch.setattr(encoder_cache, "MEL_FRAMES_PER_BATCH", 800)
    processor = make_processor("words", audio_padding=padding)  # windows of 200 frames
    lengths = [*range(1600, 32_000, 1600), 40_000, 50_000, 200_000]
    clips = [(str(length), np.zeros(length, np.float32)) for length in lengths]
    groups = list(encoder_cache._batches(clips, processor))
    assert [clip for group in groups for clip in group] == clips
    costs = []
    for group in groups:
        n_windows, _, frames = processor.audio_features([waveform for _, waveform in group])["input_features"].shape
        costs.append(n_windows * frames)
    assert max(costs[:-1]) <= 800 < costs[-1] and len(groups[-1]) == 1  # one clip is never cut
    # Counted by hand: as full as they can be.
    expected = {"max_length": [4, 4, 4, 4, 3, 2, 1], "longest": [8, 5, 4, 3, 1, 1]}
    assert [len(group) for group in groups] == expected[padding]
