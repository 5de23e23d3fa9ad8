"""Rows that cannot be used: left out, counted by reason, listed once, and too many of them stop the run."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from soundwave.modeling_soundwave.ctc_soundwave import _feasible
from soundwave.training.collator import BadRow, SoundwaveCollator
from soundwave.training.data import DataError, load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.finite import NONFINITE
from soundwave.training.skipping import SKIPPED, SkippingCollator, take_rows
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.train import run_stage
from tests.training_rows import WORDS, write_rows

ROOT = Path(__file__).parents[1]

# What is wrong with the row of that id, the reason that is counted, and a part of what is said of it.
BROKEN = {
    "missing": ("unreadable_audio", "gone.wav"),
    "garbage": ("unreadable_audio", "garbage.wav"),
    "truncated": ("unreadable_audio", "truncated.wav"),
    "without_samples": ("unreadable_audio", "no samples"),
    "nan": ("unreadable_audio", "NaN"),
    "url": ("unreadable_audio", "no public address"),
    "lost_words": ("empty_transcript", "has no tokens"),
    "squeezed": ("target_too_long", "do not fit the 5 frames of 40 ms"),
}
UNANSWERED = {
    "no_answer": ("empty_answer", "no answer"),
    "blank_answer": ("empty_answer", "is empty"),
    "blank_turn": ("empty_answer", "is empty"),
    "endless": ("too_long", "exceed the LLM's context of 2048"),
}


def write_broken_rows(folder: Path) -> Path:
    """`broken.jsonl`: a row for each entry of `BROKEN` and `UNANSWERED`, beside the recordings that they name."""
    shutil.copyfile(folder / "clip4.wav", folder / "truncated.wav")
    os.truncate(folder / "truncated.wav", (folder / "clip4.wav").stat().st_size // 2)
    (folder / "garbage.wav").write_bytes(np.random.default_rng(1).bytes(5000))
    soundfile.write(folder / "without_samples.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    audio = {"missing": "gone.wav", "url": "http://127.0.0.1:9/a.wav"}
    fields = {
        "lost_words": {"transcript": "", "answer": ""},
        "squeezed": {"audio": "clip0.wav", "transcript": "three three three three"},
        "no_answer": {"audio": "clip1.wav", "answer": None},
        "blank_answer": {"audio": "clip1.wav", "answer": " \n"},
        "endless": {"audio": "clip1.wav", "answer": "three " * 2100},
    }
    turns = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": " "}]
    rows = []
    for name in [*BROKEN, *UNANSWERED]:
        row = {"id": name, "task": "asr", "answer": "red boxes", "transcript": "three", "source": "broken"}
        row["audio"] = audio.get(name, f"{name}.wav" if (folder / f"{name}.wav").is_file() else "clip2.wav")
        row |= fields.get(name, {})
        if name == "blank_turn":
            row = {"id": name, "task": "chat", "messages": turns, "source": "broken"}
        rows.append(row)
    path = folder / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with `rows.jsonl`, all good, and `broken.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder)
    write_broken_rows(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][4:10]
    rows[-1]["answer"] = None  # nothing else says that nothing is said in it
    (folder / "bad.jsonl").write_text("".join((folder / "broken.jsonl").read_text().splitlines(keepends=True)[:2]))
    (folder / "silent.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def good(data):
    return list(load_rows(data / "rows.jsonl"))


@pytest.fixture(scope="module")
def broken(data):
    return {row["id"]: row for row in load_rows(data / "broken.jsonl")}


@pytest.mark.parametrize("cached", [False, True])
def test_every_kind_of_bad_row_has_its_reason(good, broken, processor, tiny_model, tmp_path, cached):
    cache = None
    if cached:
        clips = [clip for row in [*good, *broken.values()] for clip in recordings(row)]
        cache = EncoderCache.build(tmp_path, tiny_model, processor, clips, progress=False)
    collator = SkippingCollator(processor, cache=cache, config=tiny_model.config)
    batch = collator([good[0], *broken.values(), good[1]])
    assert batch["ids"] == ["s0", *broken, "s1"]
    assert batch["skipped"][0] is None and batch["skipped"][-1] is None
    for entry, (name, (reason, part)) in zip(batch["skipped"][1:-1], (BROKEN | UNANSWERED).items(), strict=True):
        assert (entry["id"], entry["reason"], entry["source"]) == (name, reason, "broken")
        assert part in entry["detail"]
    assert take_rows(batch)[0] == ["s0", "s1"]
    expected = SoundwaveCollator(processor, cache=cache)([good[0], good[1]])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_each_stage_minds_what_it_learns_from(good, broken, processor, tiny_model):
    def reasons(losses, rows):
        return [bad and bad["reason"] for bad in SkippingCollator(processor, losses)(rows)["skipped"]]

    squeezed, unanswered, lost = broken["squeezed"], broken["no_answer"], broken["lost_words"]
    assert reasons(("ctc",), [unanswered, lost, good[10]]) == [None, "empty_transcript", "no_audio"]
    assert reasons(("answer",), [squeezed, unanswered, good[10]]) == [None, "empty_answer", None]
    unknown, spoken = {**good[0], "transcript": None}, {**good[0], "transcript": " ", "answer": "(noise)"}
    assert reasons(("ctc",), [unknown, spoken]) == ["empty_transcript", None]
    assert reasons(("answer", "ctc"), [unknown, spoken]) == [None, None]
    # A restricted head cannot emit every token.
    config = copy.deepcopy(tiny_model.config)
    config.ctc_token_ids = sorted(processor.ctc_label_ids(WORDS[0]))
    both = SkippingCollator(processor, ("ctc",), config=config)([good[0], good[1]])["skipped"]
    assert both[0] is None and both[1]["reason"] == "bad_text" and "ctc_token_ids" in both[1]["detail"]
    # Text that cannot be encoded at all, and an audio item without its recording.
    item = {"type": "audio", "text": None}
    turns = [{"role": "user", "content": [item]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    nothing = {**good[10], "messages": turns}
    assert reasons(("answer",), [{**good[10], "answer": "\ud800"}, nothing]) == ["bad_text", "bad_text"]


def test_the_context_counts_what_the_llm_may_see(good, processor, tiny_model):
    config = copy.deepcopy(tiny_model.config)
    prompt, answer = processor.prompt_and_answer_ids(processor.example_messages(good[9]))
    frames = 3 * 25  # of 3 s
    needed = len(prompt) - 1 + len(answer) + frames
    for context, budget, fits in ((needed, None, True), (needed - 1, None, False), (needed - 70, 5, True)):
        config.text_config.max_position_embeddings, config.max_audio_positions = context, budget
        skipped = SkippingCollator(processor, config=config)([good[9]])["skipped"]
        assert (skipped == [None]) == fits
        assert fits or (skipped[0]["reason"] == "too_long" and f"up to {frames} positions" in skipped[0]["detail"])


@given(text=st.lists(st.sampled_from([*WORDS, "three"]), min_size=1, max_size=6), milliseconds=st.integers(1, 1500))
def test_what_fits_its_frames_is_what_the_loss_takes(good, processor, text, milliseconds):
    audio = {"array": np.zeros(16 * milliseconds, np.float32), "sampling_rate": 16_000}
    collator = SoundwaveCollator(processor, ("ctc",))
    ids = processor.ctc_label_ids(" ".join(text))
    features = processor.audio_features([processor.load_audio(audio)])
    frames = features["input_features_mask"].sum(dim=1) // 4
    feasible = bool(_feasible(torch.tensor([ids]), frames, torch.tensor([len(ids)])))
    row = {**good[0], "audio": audio, "transcript": " ".join(text)}
    if feasible:
        assert collator([row])["ctc_label_lengths"].tolist() == [len(ids)]
    else:
        with pytest.raises(BadRow, match="do not fit"):
            collator([row])


@given(chosen=st.lists(st.integers(0, 13), min_size=1, max_size=4), bad=st.sets(st.sampled_from(sorted(BROKEN))))
def test_bad_rows_do_not_touch_the_loss_of_the_others(good, broken, processor, tiny_model, chosen, bad):
    rows = [good[k] for k in chosen]
    mixed = [*rows[:1], *(broken[name] for name in sorted(bad)), *rows[1:]]
    collator = SkippingCollator(processor, config=tiny_model.config)
    batches = [collator(mixed), collator(rows)]
    assert take_rows(batches[0])[0] == take_rows(batches[1])[0] == [row["id"] for row in rows]
    with torch.no_grad():
        one, two = (tiny_model(**batch) for batch in batches)
    assert torch.equal(one.loss, two.loss) and torch.equal(one.ce_loss, two.ce_loss)


@pytest.mark.parametrize("losses", [("ctc",), ("answer", "ctc"), ("answer",)])
@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_of_bad_rows_teaches_nothing(broken, processor, tiny_model, tiny_ctc, tmp_path, losses, cached):
    cache = None
    if cached:
        clips = recordings(broken["garbage"])
        cache = EncoderCache.build(tmp_path, tiny_model, processor, clips, progress=False)
    batch = SkippingCollator(processor, losses, cache)([broken["garbage"]])
    ids, skipped = take_rows(batch)
    assert ids == [] and len(skipped) == 1
    model = copy.deepcopy(tiny_ctc if losses == ("ctc",) else tiny_model).train()
    if cached and "encoder_features" in batch:
        batch["encoder_features"] = batch["encoder_features"].float()
    out = model(**batch)
    assert out.loss == 0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    if losses == ("ctc",):  # without it, the others would wait for the gradients of this device
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.fixture
def run(data, encoder_folder, llm_folder, tmp_path):
    """Run a stage from its components in a folder of that name; what it left there."""

    def start(stage, name, sources=("rows.jsonl", "broken.jsonl"), **fields):
        settings = {
            "output_dir": str(tmp_path / name),
            "audio_model": encoder_folder,
            "text_model": llm_folder,
            "model": {"audio_padding": "longest"},
            "data_root": str(data),
            "data": list(sources),
            "global_batch": 4,
            "per_device_batch": 2,
            "steps": 8,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "device": "cpu",
            "progress": False,
            "report_to": [],
            "max_skipped_fraction": 1.0,
        }
        run_stage(StageConfig.for_stage(stage, **settings | fields))
        return tmp_path / name

    return start


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["align", "shrink", "instruct"])
def test_a_run_goes_on_past_bad_rows(run, stage, capfd):
    folder = run(stage, "run")
    listed, log = lines(folder / SKIPPED), lines(folder / "train_log.jsonl")
    keys = [entry["id"] for entry in listed]
    assert len(keys) == len(set(keys)) and all(entry["split"] == "train" for entry in listed)
    last = [entry for entry in log if "learning_rate" in entry][-1]  # without a loss if the last four rows are bad
    counts = {name.removeprefix("skipped/"): n for name, n in last.items() if name.startswith("skipped/")}
    # 32 draws of 26 rows: every row was drawn, some of them twice, and listed once.
    assert set(counts) == {entry["reason"] for entry in listed} and sum(counts.values()) >= len(listed)
    unusable = set(BROKEN) | (set(UNANSWERED) if stage != "align" else set())  # rows without audio are left out before
    unusable -= {"lost_words", "squeezed"} if stage == "instruct" else set()
    assert unusable <= set(keys) and (stage != "instruct" or set(keys) - unusable == {"lost_words"})
    assert all(np.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    said = capfd.readouterr().err
    assert f"{sum(counts.values())} of 32 rows were left out (" in said and str(folder / SKIPPED) in said


def test_an_update_without_a_good_row_changes_nothing(run):
    """Not even by momentum or weight decay; the rows are listed, and the loss is left out of the log."""
    settings = {"weight_decay": 0.5, "global_batch": 2, "logging_steps": 1}
    folders = [run("align", f"bad{steps}", ["bad.jsonl"], steps=steps, **settings) for steps in (1, 3)]
    one, three = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], three[name]) for name in one)
    log = lines(folders[1] / "train_log.jsonl")
    assert not any("loss" in entry or "nonfinite_updates" in entry for entry in log if "learning_rate" in entry)
    assert not (folders[1] / NONFINITE).exists()
    assert {entry["id"] for entry in lines(folders[1] / SKIPPED)} == {"missing", "garbage"}


def test_a_resumed_run_lists_and_learns_the_same(run, tmp_path):
    """Also with processes that read ahead: what a step leaves out follows from the step."""
    settings = {"save_steps": 3, "save_total_limit": 5, "steps": 7}
    whole = run("shrink", "whole", **settings)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    # As a kill leaves it: lines of steps after the checkpoint, the last of them cut short.
    text = (whole / SKIPPED).read_text()
    (resumed / SKIPPED).write_text(text[: int(0.8 * len(text))])
    run("shrink", "resumed", resume=True, dataloader_workers=2, **settings)
    assert (resumed / SKIPPED).read_text() == text
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [lines(folder / "train_log.jsonl") for folder in (whole, resumed)]
    counted = [[{k: v for k, v in e.items() if k.startswith("skipped/")} for e in log] for log in logs]
    assert counted[0] == counted[1] and any(counted[0])


def test_a_run_stops_above_the_fraction(run, tmp_path):
    with pytest.raises(DataError, match=r"rows were left out \(.*unreadable_audio \d+.*max_skipped_fraction = 0.05"):
        run("shrink", "stopped", max_skipped_fraction=0.05, steps=30)
    listed = lines(tmp_path / "stopped" / SKIPPED)
    assert max(entry["step"] for entry in listed) <= 7  # at the end of the epoch: 26 rows are too few before
    with pytest.raises(DataError, match="the first are 's9'"):
        run("align", "silent", ["silent.jsonl"], max_skipped_fraction=0.0)
    assert not (tmp_path / "silent" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="max_skipped_fraction is 5.0, expected a share"):
        run("align", "silly", max_skipped_fraction=5)


def test_many_rows_are_judged_before_the_epoch_ends(run, data, tmp_path):
    good, bad = ((data / name).read_text().splitlines() for name in ("rows.jsonl", "broken.jsonl"))
    (data / "many.jsonl").write_text("\n".join(good[:10] * 20 + bad[:5] * 10))
    with pytest.raises(DataError, match=r"\d+ of (100|104|108) rows were left out"):
        run("align", "many", ["many.jsonl"], max_skipped_fraction=0.1, steps=60, logging_steps=60)


def test_validation_counts_bad_rows_and_goes_on(run):
    settings = {"eval_data": ["rows.jsonl", "broken.jsonl"], "eval_steps": 2, "steps": 2, "eval_generate_rows": 0}
    folder = run("shrink", "mixed", ["rows.jsonl"], **settings)
    clean = run("shrink", "clean", ["rows.jsonl"], **settings | {"eval_data": ["rows.jsonl"]})
    one, two = (
        [entry for entry in lines(path / "train_log.jsonl") if "eval_skipped" in entry] for path in (folder, clean)
    )
    assert [entry["eval_skipped"] for entry in one] == [12] and [entry["eval_skipped"] for entry in two] == [0]
    for name in ("eval_ce_loss", "eval_ctc_loss"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-5)
    listed = lines(folder / SKIPPED)
    assert {entry["id"] for entry in listed} == set(BROKEN | UNANSWERED)
    assert all(entry["split"] == "validation" and entry["step"] == 2 for entry in listed)
    assert not (clean / SKIPPED).exists()


def test_a_cache_of_broken_recordings(run, tmp_path):
    settings = {"encoder_cache": str(tmp_path / "cache"), "spec_augment": False, "steps": 3}
    plain, cached = run("align", "plain", steps=3, spec_augment=False), run("align", "cached", **settings)
    ids = [sorted((entry["id"], entry["reason"]) for entry in lines(folder / SKIPPED)) for folder in (plain, cached)]
    assert ids[0] == ids[1] and len(ids[0]) >= 3


def test_processes_list_together_and_stop_together(data, encoder_folder, llm_folder, tmp_path):
    """Bad rows of both devices come into one list; above the fraction both stop, and neither waits for the other."""
    settings = {
        "audio_model": encoder_folder,
        "text_model": llm_folder,
        "model": {"audio_padding": "longest"},
        "data_root": str(data),
        "data": ["broken.jsonl", "rows.jsonl"],
        "eval_data": ["broken.jsonl", "rows.jsonl"],
        "eval_steps": 7,
        "eval_generate_rows": 0,
        "global_batch": 4,
        "per_device_batch": 1,  # so that a device has nothing but bad rows now and then
        "steps": 7,
        "logging_steps": 1,
        "device": "cpu",
        "progress": False,
        "report_to": [],
    }
    script = f"""
        import os
        from soundwave.training.data import DataError
        from soundwave.training.stages import StageConfig
        from soundwave.training.train import run_stage
        def run(name, fraction):
            folder = os.path.join({str(tmp_path)!r}, name)
            run_stage(StageConfig.for_stage("shrink", output_dir=folder, max_skipped_fraction=fraction, **{settings}))
        run("all", 1.0)
        try:
            run("few", 0.05)
        except DataError as error:
            print("stopped", os.environ["RANK"], error, flush=True)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "script.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    listed = lines(tmp_path / "all" / SKIPPED)
    seen = {split: {e["id"] for e in listed if e["split"] == split} for split in ("train", "validation")}
    assert seen["train"] == seen["validation"] == set(BROKEN | UNANSWERED)
    assert len(listed) == 2 * len(seen["train"])
    metrics = [e for e in lines(tmp_path / "all" / "train_log.jsonl") if "eval_skipped" in e]
    assert [entry["eval_skipped"] for entry in metrics] == [len(seen["validation"])]
    assert done.stderr.count("of 28 rows were left out") == 1
    stopped = sorted(line for line in done.stdout.splitlines() if line.startswith("stopped"))
    assert len(stopped) == 2 and stopped[0].partition(" 0 ")[2] == stopped[1].partition(" 1 ")[2]
    assert "more than max_skipped_fraction = 0.05 allows; the first are" in stopped[0]
