"""The quickstart's report: figures equal to the results, pictures of the model's own frames, samples to hear."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from soundwave.apps import pictures, report
from soundwave.eval.results import read_answers, read_results
from soundwave.eval.rows import evaluate_ctc, evaluate_rows
from soundwave.modeling_soundwave.seams_soundwave import collapse_runs
from tests.conftest import SAMPLING_RATE, tone

SPEECH = "Synthesized tones; nobody speaks."


def sound(seconds):
    return {"array": tone(seconds), "sampling_rate": SAMPLING_RATE}


@pytest.fixture(scope="module")
def stages(tiny_model, tiny_ctc, processor, tmp_path_factory):
    """Two evaluated stages of a random model, and one that was not evaluated."""
    root = tmp_path_factory.mktemp("run")
    rows = []
    for i, seconds in enumerate((0.5, 0.8, 1.1)):
        soundfile.write(root / f"{i}.wav", tone(seconds, 300 + 100 * i), SAMPLING_RATE)
        rows.append(
            {
                "id": f"item/{i}",
                "audio": str(root / f"{i}.wav"),
                "task": "asr",
                "instruction": "Transcribe the speech.",
                "answer": "<cough> one | two",
                "transcript": "<cough> one | two",
                "duration_s": seconds,
            }
        )
    broken = rows[0] | {"id": "gone", "audio": str(root / "gone.wav")}
    evaluate_ctc(tiny_ctc, processor, rows, name="asr_seen", output_dir=root / "align", progress=False)
    for name, some in (("asr_seen", rows), ("asr_unseen", [*rows, broken])):
        evaluate_rows(
            tiny_model,
            processor,
            some,
            "asr",
            name=name,
            output_dir=root / "instruct",
            max_new_tokens=3,
            progress=False,
        )
    curve = [(step, 5.0 / step) for step in range(1, 40)]
    return [
        report.StageSummary("Stage 0: encoder", "everything", 61, 900, curve, figures={"frame accuracy": "91.0%"}),
        report.StageSummary("Stage I: alignment", "alignment adapter", 3600, 600, curve, root / "align"),
        report.StageSummary("Stage III: instruction", "LoRA", 5, 250, curve[:1], root / "instruct"),
    ]


def test_report_shows_the_results(stages, tiny_ctc, processor, tmp_path):
    view = pictures.look_inside(tiny_ctc, processor, sound(1.5), said="one two", answer="eins <zwei>")
    path = report.write_report(
        tmp_path / "out",
        title="Quickstart",
        speech=SPEECH,
        stages=stages,
        next_steps=["soundwave ask recording.wav 'What is said?'"],
        utterance=view,
        command="soundwave quickstart",
        seconds=700,
    )
    text = path.read_text()
    for stage in stages[1:]:
        for entry in read_results(stage.folder):
            assert report.percent(entry) in text
    assert f"**What kind of speech this is.** {SPEECH}" in text
    assert "| Stage 0: encoder | everything | 900 | 1 min 01 s | frame accuracy 91.0% |" in text
    assert "1 failed" in text and "11 min 40 s" in text
    assert f"{int(view.kept.sum())} positions for {len(view.kept)} frames" in text
    assert "soundwave ask recording.wav" in text
    assert "&lt;cough> one \\| two" in text, "labels and bars must survive Markdown"
    for picture in (report.CURVES_PICTURE, report.UTTERANCE_PICTURE):
        assert f"]({picture})" in text
        with Image.open(path.parent / picture) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10, "an empty picture"


def test_samples_are_copies_that_can_be_played(stages, tmp_path):
    table = report.copy_samples(tmp_path, stages[-1].folder, 2)
    copied = sorted((tmp_path / "samples").iterdir())
    # All answers of a random model are wrong, and a failed item has no answer to show.
    assert len(copied) == len(table) == 4  # two of each test set
    assert {row[-1] for row in table} == {"wrong"}
    for file in copied:
        samples, rate = soundfile.read(file)
        assert rate == SAMPLING_RATE and len(samples)
    answers = {row["answer"] for row in read_answers(stages[-1].folder)}
    assert all(row[3] in answers for row in table)


def test_samples_show_right_and_wrong(stages, tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    source = stages[-1].folder
    entry = next(e for e in read_results(source) if e["name"] == "asr_seen")
    (folder / "results.json").write_text(json.dumps({"results": [entry]}))
    rows = [row for row in read_answers(source) if row["name"] == "asr_seen"]
    for row in rows:
        row["audio"] = [str((source / row["audio"][0]).resolve())]
    rows[0]["answer"] = rows[0]["reference"]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(row[-1] for row in report.copy_samples(tmp_path / "out", folder, 2)) == ["right", "wrong"]
    assert [row[-1] for row in report.copy_samples(tmp_path / "out", folder, 3)].count("wrong") == 2


def test_summary_fits_a_screen_and_tells_the_same(stages, capsys):
    report.print_summary(stages, "out/report.md", SPEECH, ["soundwave ask x.wav y"])
    text = capsys.readouterr().out
    for entry in read_results(stages[-1].folder):
        assert report.percent(entry) in text
    assert SPEECH in text and "out/report.md" in text
    assert len(text.splitlines()) < 40


def test_nothing_evaluated(tmp_path):
    stage = report.StageSummary("Stage I", "adapter", 1, 10)
    text = report.write_report(tmp_path, title="t", speech=SPEECH, stages=[stage], next_steps=["ls"]).read_text()
    assert "Nothing was evaluated." in text
    assert "![" not in text and not (tmp_path / "samples").exists()


def test_the_picture_holds_the_models_own_frames(tiny_ctc, processor):
    wave = tone(1.5)
    view = pictures.look_inside(tiny_ctc, processor, sound(1.5))
    output = tiny_ctc(**processor.audio_features([wave]))
    blank = tiny_ctc.config.blank_id
    A = int(output.mask[0].sum())
    assert view.log_mel.shape[0] == tiny_ctc.config.audio_config.num_mel_bins
    assert len(view.pieces) == len(view.kept) == A
    assert [piece is None for piece in view.pieces] == (output.token_ids[0, :A] == blank).tolist()
    kept = collapse_runs(output.token_ids, output.mask, blank, tiny_ctc.config.keep_blanks)[0, :A]
    assert view.kept.tolist() == kept.tolist()
    ids = tiny_ctc.transcribe_ids(**processor.audio_features([wave]))[0]
    spelled = "".join(word for _, _, word in view.words).replace(" ", "")
    assert spelled == processor.tokenizer.decode(ids).replace(" ", "")
    with pytest.raises(ValueError, match="one window"):
        pictures.look_inside(tiny_ctc, processor, sound(5.0))


def test_words_of_pieces():
    pieces = ["Ġga", None, "rage", "rage", "Ġ", "x", "<cough>", "Ġred", "<sigh>", "box"]
    kept = np.array([True, False, True, False, True, True, True, True, True, True])
    assert pictures.word_frames(pieces, kept) == [[0, 2], [4, 5], [6], [7], [8], [9]]
    assert pictures.word_frames([None, None], np.array([True, False])) == []


def test_a_silent_recording_can_be_drawn(tmp_path):
    silent = pictures.Utterance(np.zeros((80, 40)), [None] * 10, np.array([True] + [False] * 9), [])
    pictures.draw_utterance(tmp_path / "silent.png", silent)
    assert (tmp_path / "silent.png").stat().st_size > 1000


def test_text_beyond_the_font_and_mathematics(tmp_path):
    kept = np.array([True, False])
    odd = pictures.Utterance(np.zeros((80, 8)), ["\x1a", None], kept, [(0, 0.04, "\u4f60 $x^")], "$2 \u4f60", "a_b$")
    pictures.draw_utterance(tmp_path / "odd.png", odd)
    assert pictures._drawable("a\u4f60\nb") == "a\u25a1\nb"
