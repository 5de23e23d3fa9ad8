"""What `soundwave transcribe` writes survives a kill at any byte, by one process or several."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundwave.apps import output as output_module
from soundwave.apps.inputs import Job
from soundwave.apps.output import TranscriptLog, claim, merge, part_of


def resume(output, settings, wanted):
    with output_module.claim(output) as sidecar:
        return output_module.resume(output, sidecar, settings, wanted)


SETTINGS = {"model": "m", "bias": ["a"], "language": None}


def line(name: str, **values) -> str:
    return json.dumps({"file": name, **(values or {"text": f"text of {name}"})}) + "\n"


def keys(path) -> list[str]:
    return [json.loads(one)["file"] for one in path.read_text().splitlines()]


@given(st.data())
def test_a_kill_at_any_byte_loses_and_repeats_nothing(tmp_path_factory, data):
    """Killed anywhere, several times, with other numbers of processes: each record ends up there once."""
    output = tmp_path_factory.mktemp("run") / "out.jsonl"
    sidecar = output.with_name("out.jsonl.settings.json")
    wanted = [("", f"näme {k}") for k in range(8)]
    done = resume(output, SETTINGS, set(wanted))
    for _ in range(3):
        processes = data.draw(st.integers(1, 3))
        left = [key for key in wanted if key not in done]
        for rank in range(processes):
            mine = "".join(line(name) for _, name in left[rank::processes]).encode()
            with open(part_of(output, rank, processes), "ab") as file:
                file.write(mine[: data.draw(st.integers(0, len(mine)))])
        whole = [path.read_bytes().split(b"\n")[:-1] for path in output.parent.glob("out.jsonl*") if path != sidecar]
        expected = {("", json.loads(one)["file"]) for lines in whole for one in lines}
        done = resume(output, SETTINGS, set(wanted))
        assert done == expected
        assert sorted(keys(output)) == sorted(name for _, name in done)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


def test_failures_are_tried_again_and_stay_if_not_asked_for(tmp_path):
    output = tmp_path / "out.jsonl"
    resume(output, SETTINGS, set())
    output.write_text(line("a", error="x") + line("b", error="y") + line("c") + line("a", error="z"))
    assert merge(output) == {("", "c")}
    assert [json.loads(one).get("error") for one in output.read_text().splitlines()] == ["y", None, "z"]
    assert resume(output, SETTINGS, {("", "a"), ("", "c")}) == {("", "c")}
    assert keys(output) == ["b", "c"]


def test_an_interrupted_merge_repeats_nothing(tmp_path):
    """Killed after the whole was in place and before the parts were gone."""
    output = tmp_path / "out.jsonl"
    output.write_text(line("a") + line("b"))
    part_of(output, 1, 2).write_text(line("b") + line("c") + line("d", error="x") + line("a", error="y"))
    assert merge(output) == {("", name) for name in "abc"}
    assert keys(output) == ["a", "b", "c", "d"] and not part_of(output, 1, 2).exists()
    assert json.loads(output.read_text().splitlines()[0])["text"] == "text of a"  # a result counts more than an error


@pytest.mark.parametrize(
    ("settings", "content", "said"),
    [
        (SETTINGS | {"language": "de"}, line("a"), "language None, now 'de'"),
        (None, line("a"), "out.jsonl.settings.json"),
        (SETTINGS, "no json\n", "line 1: not JSON"),
        (SETTINGS, '{"text": "other"}\n', "line 1: no line of a transcript"),
    ],
)
def test_what_is_none_of_this_run_is_left_alone(tmp_path, settings, content, said):
    output = tmp_path / "out.jsonl"
    resume(output, SETTINGS, set())
    output.write_text(content)
    if settings is None:
        (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match=said):
        resume(output, settings or SETTINGS, set())
    assert output.read_text() == content


def test_rows_of_two_data_sets_may_have_one_id(tmp_path):
    log = TranscriptLog(tmp_path / "out.jsonl")
    for table in ("a.jsonl", "b.jsonl"):
        log.append(Job("1", "x.wav", "", table=table), {"text": table})
    log.close()
    assert merge(tmp_path / "out.jsonl") == {("a.jsonl", "1"), ("b.jsonl", "1")}
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {"data": "a.jsonl", "id": "1", "text": "a.jsonl"} and second["text"] == "b.jsonl"


def test_two_runs_at_once(tmp_path):
    output = tmp_path / "out.jsonl"
    with claim(output), pytest.raises(ValueError, match="another run is writing"):
        claim(output)
    assert resume(output, SETTINGS, set()) == set()


def test_an_empty_output_takes_any_settings(tmp_path):
    output = tmp_path / "new" / "folder" / "out.jsonl"
    resume(output, SETTINGS, set())
    output.touch()
    assert resume(output, SETTINGS | {"language": "de"}, set()) == set()


def test_names_that_are_no_unicode(tmp_path):
    name = b"caf\xe9 \xe4\xb8\xad.wav".decode("utf-8", "surrogateescape")
    log = TranscriptLog(tmp_path / "out.jsonl")
    log.append(Job(name, name, ""), {"text": "中"})
    log.close()
    assert merge(tmp_path / "out.jsonl") == {("", name)}
    assert "中" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
