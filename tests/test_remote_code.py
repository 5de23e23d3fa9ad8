"""A saved model carries its code: which files, what they import, and that a process without this package can run it.

From a Hub at a branch and at an older commit, by every Auto class; from a folder in `test_loading`.
"""

import json
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from tests.local_hub import LocalHub
from tests.test_hub_round_trip import run

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "modeling_soundwave", ROOT / "processing"]
# What a remote user has: transformers needs the first ones itself. The library's own check counts these and no others.
ALLOWED = {"torch", "numpy", "safetensors", "transformers"}

PUBLISH = """
    import json, torch
    from pathlib import Path
    from huggingface_hub import HfApi
    from safetensors.torch import load_file
    from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
    from tests.components import save_encoder, save_llm
    from tests.conftest import tone

    torch.set_num_threads(1)
    hub, said = HfApi(), {}
    for name in ("model", "encoder"):
        hub.create_repo(f"ours/{name}")
    for seed, revision in enumerate((None, "second", None)):
        encoder, llm = save_encoder(Path(f"encoder{seed}"), seed=seed), save_llm(Path("llm"), seed=seed + 10)
        processor = SoundwaveProcessor.from_components(encoder, llm, audio_padding="longest")
        torch.manual_seed(seed)
        model = SoundwaveForConditionalGeneration.from_components(
            encoder, llm, audio_token_id=processor.audio_token_id, audio_padding="longest"
        )
        model.push_to_hub("ours/model", revision=revision)
        processor.push_to_hub("ours/model", revision=revision)
        encoder_commit = hub.upload_folder(repo_id="ours/encoder", folder_path=encoder).oid
        if seed == 0:
            first = encoder_commit
            hub.create_branch("ours/encoder", branch="first")
        inputs = processor(audio=[tone(0.6), tone(3.1, 300.0)], sampling_rate=16_000)
        ids = model.generate(**inputs, max_new_tokens=8).tolist()
        heard = model.transcribe_ids(**processor.audio_features([tone(0.6), tone(3.1, 300.0)]))
        said[revision or hub.model_info("ours/model").sha] = [ids] * 3 + [heard]
    found = {}  # of the encoder at a branch, at its commit, and at the newest
    for revision in ("first", first, None):
        model = SoundwaveForCTC.from_components("ours/encoder", llm, audio_revision=revision)
        read = model.audio_tower.conv1.weight[0, 0].tolist()
        found[str(revision)] = [model.config.audio_model_revision, read]
    folders = [load_file(f"encoder{seed}/model.safetensors")["conv1.weight"][0, 0].tolist() for seed in (0, 2)]
    expected = {"first": [first, folders[0]], first: [first, folders[0]], "None": [encoder_commit, folders[1]]}
    assert found == expected, (found, expected)
    del said[hub.model_info("ours/model").sha]  # the newest is what `test_hub_round_trip` loads
    print(json.dumps(said))
"""

LOAD = """
    import sys
    # None: an import of it fails as if it were not installed, an editable installation included.
    sys.modules |= dict.fromkeys(("soundwave", "peft", "trl", "soundfile", "torchaudio"))
    import json
    import numpy as np
    import torch
    from transformers import (
        AutoModel, AutoModelForCausalLM, AutoModelForCTC, AutoModelForMultimodalLM, AutoProcessor
    )

    def tone(seconds, frequency_hz=440.0):
        time_s = np.arange(round(seconds * 16_000)) / 16_000
        return (0.1 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)

    torch.set_num_threads(1)
    said, modules = {}, set()
    for name in json.loads(sys.argv[1]):
        source, revision = "ours/model", {"revision": name, "trust_remote_code": True}
        processor = AutoProcessor.from_pretrained(source, **revision)
        clips = [tone(0.6), tone(3.1, 300.0)]
        inputs = processor(audio=clips, sampling_rate=16_000)
        said[name] = []
        for auto in (AutoModel, AutoModelForMultimodalLM, AutoModelForCausalLM):
            model = auto.from_pretrained(source, **revision)
            said[name].append(model.generate(**inputs, max_new_tokens=8).tolist())
        reader = AutoModelForCTC.from_pretrained(source, **revision)
        said[name].append(reader.transcribe_ids(**processor.audio_features(clips)))
        modules |= {type(item).__module__.partition(".")[0] for item in (processor, model, reader)}
    print(json.dumps({"said": said, "modules": sorted(modules)}))
"""


def code_files(folder: Path, *entries: str) -> set[str]:
    """The files that the library finds from the entries on, by their relative imports."""
    found = {f"{entry}.py" for entry in entries}
    for entry in entries:
        found |= {Path(path).name for path in get_relative_import_files(str(folder / f"{entry}.py"))}
    return found


def test_a_saved_model_has_the_files_that_its_code_names(tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.glob("*.py")}
    config = json.loads((tmp_path / "config.json").read_text())
    entries = {reference.partition(".")[0] for reference in config["auto_map"].values()}
    needed = code_files(FOLDERS[0], *entries) | code_files(FOLDERS[1], "processing_soundwave")
    pipelines = config.get("custom_pipelines", {}).values()
    assert saved == needed | {pipeline["impl"].partition(".")[0] + ".py" for pipeline in pipelines}
    assert all(name.endswith("_soundwave.py") for name in saved)
    for name in saved:
        source = next(folder / name for folder in FOLDERS if (folder / name).is_file())
        assert (tmp_path / name).read_text() == source.read_text()


@pytest.mark.parametrize(
    "path", [p for folder in FOLDERS for p in folder.glob("*_soundwave.py")], ids=lambda p: p.name
)
def test_remote_code_imports_what_every_user_has(path):
    imported = set(get_imports(path))  # those inside try are the file's own business
    assert imported <= ALLOWED | sys.stdlib_module_names
    siblings = [Path(name) for name in get_relative_import_files(str(path))]
    assert all(sibling.is_file() and sibling.parent == path.parent for sibling in siblings)


def test_file_names_are_unique_over_both_folders():
    names = [path.name for folder in FOLDERS for path in folder.glob("*_soundwave.py")]
    assert len(names) == len(set(names))


def test_every_auto_class_from_a_hub_at_a_revision(tmp_path):
    work, away = tmp_path / "work", tmp_path / "away"
    work.mkdir()
    away.mkdir()
    with LocalHub(tmp_path / "hub") as hub:
        published = run(hub, PUBLISH, work, "publisher")
        assert len({json.dumps(said) for said in published.values()}) == 2
        loaded = run(hub, LOAD, away, "user", json.dumps(sorted(published)), isolated=True)
    assert loaded["modules"] == ["transformers_modules"]
    assert loaded["said"] == published
