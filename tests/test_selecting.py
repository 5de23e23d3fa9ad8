"""What tells the items of one run from those of another: all that is asked, and all that decides the scores."""

import dataclasses

import pytest

from soundwave.eval.items import FileClip, Item
from soundwave.eval.logs import read_answers
from soundwave.eval.runner import Runner
from soundwave.eval.selecting import describe_dataset, sample_items
from tests.scripted import ScriptedModel, Words, right_answers, word_items


def item(**changes) -> Item:
    fields = {"choices": ["red", "blue"], "source": "made up"}
    return dataclasses.replace(Item("a", "Which?", [FileClip("a.wav")], "red", "colours", fields), **changes)


def revision(asked: Item, **about) -> str:
    return describe_dataset(about, [asked], 1)["revision"]


@pytest.mark.parametrize(
    "changes",
    [
        {"fields": {"choices": ["red", "green"], "source": "made up"}},
        {"fields": {"choices": ["blue", "red"], "source": "made up"}},
        {"fields": {"choices": ["red", "blue"], "source": "made up", "meta_info": "a painting"}},
        {"instruction": "Which one?"},
        {"reference": "blue"},
        {"group": "shades"},
        {"clips": [FileClip("b.wav")]},
    ],
)
def test_all_that_decides_a_score_is_in_the_revision(changes):
    assert revision(item(**changes)) != revision(item())


def test_folders_order_of_fields_and_problems_are_not_in_the_revision():
    fields = {"source": "made up", "choices": ["red", "blue"], "error": "a.wav is not there"}
    assert revision(item(clips=[FileClip("elsewhere/a.wav")], fields=fields)) == revision(item())


def test_data_on_the_hub_goes_by_its_commit():
    about = describe_dataset({"name": "someone/colours", "revision": "abc123"}, [item()], 1)
    assert about["revision"] == "abc123" and about["content"] == revision(item())


class Listener(ScriptedModel):
    """Notes in an item what it heard, as models do."""

    def answer(self, items, max_new_tokens):
        for asked in items:
            asked.fields["heard_s"] = 30
        return super().answer(items, max_new_tokens)


def test_what_a_model_notes_is_in_its_row_and_not_in_the_data(tmp_path):
    items = word_items(3)
    for limit in (None, 2):
        runner = Runner(Listener(right_answers(3)), tmp_path / str(limit), limit=limit, progress=False)
        first, again = runner.run(Words(), items), runner.run(Words(), items)
        assert first.dataset == again.dataset
        assert all(row["fields"]["heard_s"] == 30 for row in read_answers(tmp_path / str(limit)))
    assert all(asked.fields == {} for asked in items) and sample_items(items, None) == items


def test_changed_choices_are_not_resumed_and_repaired_items_are(tmp_path):
    items = word_items(3)
    items[1].fields = {"choices": ["word 1", "word 2"], "error": "1.wav is not there"}
    with pytest.raises(KeyboardInterrupt):
        run = ScriptedModel(right_answers(3) | {"2": KeyboardInterrupt()})
        Runner(run, tmp_path, batch_size=1, progress=False).run(Words(), items)
    items[1].fields = {"choices": ["word 1", "word 3"]}
    with pytest.raises(ValueError, match="other settings .*dataset.revision 'sha256:.*--overwrite"):
        Runner(ScriptedModel(right_answers(3)), tmp_path, progress=False).run(Words(), items)
    items[1].fields = {"choices": ["word 1", "word 2"]}
    result = Runner(ScriptedModel(right_answers(3)), tmp_path, progress=False).run(Words(), items)
    assert (result.count, result.failures, result.resumed) == (3, 0, 1)
