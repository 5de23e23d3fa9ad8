"""Settings of a run: the stage table, YAML files, overrides, and errors that name the field."""

import pytest
import yaml

from soundwave.training.stages import STAGES, ConfigError, StageConfig, load_config


def test_the_table_holds_the_papers_values():
    rows = {name: stage.defaults for name, stage in STAGES.items()}
    assert [rows[name]["global_batch"] for name in rows] == [32 * 8 * 32, 16 * 8 * 32, 8 * 4 * 32]
    assert [rows[name]["learning_rate"] for name in rows] == [1e-4, 3e-5, 3e-5]
    assert [rows[name]["steps"] for name in rows] == [6000, 6000, 4000]
    assert STAGES["align"].losses == ("ctc",) and STAGES["instruct"].losses == ("answer",)
    config = StageConfig.for_stage("shrink")
    assert (config.lora_r, config.lora_alpha, config.lora_targets) == (
        64,
        16,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    assert (config.temperature_start, config.temperature_step, config.spec_augment) == (1, 5, True)


def test_overrides_change_fields_and_entries_of_mappings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stage: align\nsteps: 5\nlearning_rate: 1e-3\nmodel: {ctc_head: tied}\ndata: a.jsonl\n")
    config = load_config(path, ["steps=7", "model.keep_blanks=true", "learning_rate=2e-4", "data=[b.jsonl, c.jsonl]"])
    assert (config.steps, config.learning_rate) == (7, 2e-4)
    assert config.model == {"ctc_head": "tied", "keep_blanks": True}
    assert config.data == ["b.jsonl", "c.jsonl"]
    assert load_config(path).data == ["a.jsonl"]
    rooted = ["data_root=data/align"]
    assert load_config(path, rooted).data_root == "data/align"
    assert load_config(path, [*rooted, "data_root=", "start="]).data_root == ""
    assert load_config(None, ["steps=3"], stage="instruct").steps == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hub_model_id=mine"], "hub_model_id is .mine., expected OWNER/NAME"),
        (["learning_rat=1"], "no setting 'learning_rat'; did you mean learning_rate"),
        (["steps=many"], "steps is 'many', expected int"),
        (["steps=1.5"], "steps is 1.5, expected int"),
        (["spec_augment=1"], "spec_augment is 1, expected bool"),
        (["steps"], "not of the form field=value"),
        (["steps=0"], "steps is 0, expected at least 1"),
        (["stage=shrink"], "is for the stage 'shrink', but 'align'"),
        (["dtype=int8"], "dtype is 'int8'"),
        (["encoder_cache=x", "spec_augment=true"], "exclude each other"),
        (["temperature_start=0"], "must be positive"),
        (["hub_strategy=always"], "hub_strategy is 'always'"),
        (["start_revision=main"], "start is not set"),
        (["bucket_batches=-1"], "bucket_batches is -1, expected 0 or more"),
        (["save_steps=0"], r"save_steps is 0, expected at least 1, or nothing \(save_steps=null\)"),
        (["draws_per_epoch=-50"], "draws_per_epoch is -50"),
        (["eval_steps=10"], "a validation needs both"),
        (["eval_data=dev.jsonl"], "a validation needs both"),
    ],
)
def test_a_wrong_setting_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides, stage="align")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "nameless.yaml").write_text("steps: 1\n")
    with pytest.raises(ConfigError, match="does not name its stage"):
        load_config(tmp_path / "nameless.yaml")


def test_accumulation_follows_from_the_devices():
    config = StageConfig.for_stage("align", global_batch=64, per_device_batch=8)
    assert [config.accumulation(devices) for devices in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(ConfigError, match="make 24 rows at once.*nearest is 72"):
        config.accumulation(3)


def test_saved_settings_load_again_without_paths_of_this_machine(tmp_path):
    config = StageConfig.for_stage(
        "shrink",
        output_dir=str(tmp_path / "out"),
        start=str(tmp_path / "one"),
        data=[str(tmp_path / "a.jsonl"), "b.csv"],
    )
    config.save(tmp_path / "stage_config.yaml")
    text = (tmp_path / "stage_config.yaml").read_text()
    assert str(tmp_path) not in text
    saved = load_config(tmp_path / "stage_config.yaml")
    assert (saved.output_dir, saved.start, saved.data) == ("out", "one", ["a.jsonl", "b.csv"])
    assert saved.trains == config.trains and set(yaml.safe_load(text)) == set(vars(config))
