"""VoiceBench on small tables in the Hub's layout, with scripted answers and judges, and the rules it is read by."""

import pytest

from soundwave.eval.benchmarks import BENCHMARKS, get_benchmark
from soundwave.eval.judge import Judge, judge_rows
from soundwave.eval.results import with_judgements
from soundwave.eval.scoring import METRICS, score_rows
from soundwave.eval.selecting import problem_of
from soundwave.eval.verdicts import refuses, spoken_letter
from soundwave.training.data import DataError
from tests.benchmark_sets import errors, scored, write_parquet
from tests.judge_server import judge_server

NAMES = [name for name in BENCHMARKS if name.startswith("voicebench_")]


def write(folder, subset, splits=("test",), **columns):
    for split in splits:
        write_parquet(folder / subset, columns)
        if split != "test":
            (folder / subset / "test-00000-of-00001.parquet").rename(
                folder / subset / f"{split}-00000-of-00001.parquet"
            )
    return folder


def judged(benchmark, items, answers, say, folder, **options):
    rows = [
        {"name": benchmark.name, "id": item.id, "reference": item.reference, "answer": answers[item.id]}
        | {"error": None, "group": item.group, "fields": item.fields}
        for item in items
    ]
    with judge_server(say) as server:
        judge = Judge("judge", folder / "judge", server.url, workers=1, **options)
        judgements = judge_rows(benchmark, rows, judge, progress=False)
    return judgements, score_rows(with_judgements(rows, judgements), benchmark.metric, benchmark.settings)


@pytest.mark.parametrize("name", NAMES)
def test_every_subset_has_a_metric_and_says_where_its_data_is(name, tmp_path):
    benchmark = get_benchmark(name)
    assert benchmark.metric in METRICS and benchmark.size
    with pytest.raises(DataError, match="hlt-lab/voicebench.*give the folder"):
        benchmark.load()
    with pytest.raises(DataError, match="holds no <split>-00000-of-00001.parquet"):
        benchmark.load(tmp_path)


class TestOpenQuestions:
    benchmark = get_benchmark("voicebench_alpacaeval")

    def test_known_score(self, tmp_path):
        items = self.benchmark.load(write(tmp_path, "alpacaeval", prompt=["one?", "two?", "three?"]))
        assert [(item.id, item.instruction) for item in items] == [(f"test/{number}", None) for number in range(3)]
        replies = {"one?": "5", "two?": "2.", "three?": "A fine answer, 4 of 5."}
        judgements, figures = judged(
            self.benchmark,
            items,
            {item.id: "an answer" for item in items},
            lambda text: next(reply for prompt, reply in replies.items() if prompt in text),
            tmp_path,
        )
        assert figures.value == 3.5 and figures.notes["judge_failures"] == 1
        assert "the judge said 'A fine answer, 4 of 5.'" in judgements[2]["error"]
        assert [row["sampling"] for row in judgements] == [{"max_tokens": 16, "temperature": 0.0}] * 3

    def test_published_sampling_asks_three_times(self, tmp_path):
        items = self.benchmark.load(write(tmp_path, "alpacaeval", prompt=["one?"]))
        replies = iter(["5", "4", "3"])
        judgements, figures = judged(
            self.benchmark, items, {"test/0": "an answer"}, lambda _: next(replies), tmp_path, official=True
        )
        assert figures.value == 4.0 and [row["order"] for row in judgements] == ["sample_1", "sample_2", "sample_3"]
        assert {row["sampling"]["temperature"] for row in judgements} == {0.5}


class TestSpokenFacts:
    benchmark = get_benchmark("voicebench_sd_qa")

    def test_regions_are_groups_and_the_majority_counts(self, tmp_path):
        folder = write(tmp_path, "sd-qa", ("aus", "usa"), prompt=["who?", "when?"], reference=["Ada", "1843"])
        items = self.benchmark.load(folder)
        assert [item.id for item in items] == ["aus/0", "aus/1", "usa/0", "usa/1"]
        replies = iter(["Yes", "no", "yes."] + ["No", "No", "Yes"] + ["yes"] * 3 + ["Yes", "it depends", "Yes"])
        answers = {item.id: item.id for item in items}
        judgements, figures = judged(self.benchmark, items, answers, lambda _: next(replies), tmp_path, official=True)
        assert figures.groups["aus"]["value"] == 0.5 and figures.groups["usa"]["value"] == 1.0
        assert figures.value == pytest.approx(2 / 3) and figures.notes["judge_failures"] == 1
        assert [row["error"] for row in judgements if row["error"]] == [
            "expected Yes or No; the judge said 'it depends'"
        ]


class TestSpokenChoices:
    benchmark = get_benchmark("voicebench_openbookqa")

    def test_known_score(self, tmp_path):
        folder = write(tmp_path, "openbookqa", prompt=["?"] * 5, reference=["A", "B", "C", "D", "E"])
        items = self.benchmark.load(folder)
        assert errors(items) == {"test/4": "reference is 'E', expected one of A, B, C, D"}
        answers = {"test/0": "A.", "test/1": "The answer is B, I think.", "test/2": "D", "test/3": "no idea"}
        figures = scored(self.benchmark, items, answers)
        assert figures.value == 0.5 and figures.count == 4 and figures.notes["parse_failures"] == 1

    @pytest.mark.parametrize(
        ("answer", "letter"),
        [
            ("B", "B"),
            ("(C) the moon", "C"),
            ("A. A rock", "A"),
            ("**D**", "D"),
            ("The correct answer is C.", "C"),
            ("The answer is: (B) sand", "B"),
            ("Is it option A? No. The answer is D because of the heat", "D"),
            ("I would choose C because it is warm", "C"),
            ("A man speaks", None),
            ("A good choice is B", "B"),
            ("It could be B or C", None),
            ("The answer is a rock", None),
            ("The answer is A because it is hard", "A"),
            ("D'accord", None),
            ("", None),
            ("seven", None),
        ],
    )
    def test_letter_of_a_spoken_answer(self, answer, letter):
        assert spoken_letter(answer) == letter


class TestHarmfulRequests:
    benchmark = get_benchmark("voicebench_advbench")

    def test_known_score(self, tmp_path):
        items = self.benchmark.load(write(tmp_path, "advbench", prompt=["how to harm?"] * 3))
        assert all(problem_of(item, self.benchmark) is None for item in items)
        answers = {"test/0": "I\u2019m sorry, I can\u2019t help.", "test/1": "Sure, first you", "test/2": ""}
        assert scored(self.benchmark, items, answers).value == pytest.approx(1 / 3)

    @pytest.mark.parametrize("answer", ["I cannot help with that.", "As an AI, I", "That is ILLEGAL? It is illegal."])
    def test_refusals(self, answer):
        assert refuses(answer)

    @pytest.mark.parametrize("answer", ["", "Sure.", "Here is how."])
    def test_no_refusals(self, answer):
        assert not refuses(answer)


def test_a_changed_schema(tmp_path):
    with pytest.raises(DataError, match="reference missing, found audio, prompt"):
        get_benchmark("voicebench_sd_qa").load(write(tmp_path, "sd-qa", ("usa",), prompt=["?"]))
    items = get_benchmark("voicebench_commoneval").load(write(tmp_path, "commoneval", prompt=["?", None]))
    assert errors(items) == {"test/1": "prompt is None, expected text"}
