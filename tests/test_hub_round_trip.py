"""Three stages, three repositories over real HTTP, and a process without this package that loads the last and answers.

One process trains (the commands of the README, a few steps each, on random components and tones). A second one, in
which `soundwave`, peft, soundfile and torchaudio cannot be imported, loads what was pushed. The Hub client reads its
endpoint at import, hence processes.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load, save

from tests.conftest import tone
from tests.local_hub import LocalHub

ROOT = Path(__file__).parents[1]

TRAIN = """
    import json, sys
    from pathlib import Path
    import torch
    from huggingface_hub import HfApi
    from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
    from soundwave.training.train import main
    from tests.components import save_encoder, save_llm
    from tests.conftest import tone

    torch.set_num_threads(1)
    pinned = json.loads(sys.argv[1])
    encoder, llm = save_encoder(Path("encoder")), save_llm(Path("llm"))
    if pinned:
        for name in (encoder, llm):
            HfApi().create_repo(f"parts/{name}")
            HfApi().upload_folder(repo_id=f"parts/{name}", folder_path=name)
        encoder, llm = "parts/encoder", "parts/llm"
    common = [
        "data=[data/train.jsonl]", "steps=2", "global_batch=4", "per_device_batch=2", "warmup_steps=1", "device=cpu",
        "learning_rate=1e-2", "progress=false", "lora_r=4", "lora_alpha=8", "logging_steps=1",
    ]
    components = [
        f"audio_model={encoder}", f"text_model={llm}", "model.audio_padding=longest", "processor.audio_padding=longest"
    ]
    # The LLM of local components is not in a stage I repository: stage II is told where it is.
    second = [] if pinned else [f"text_model={llm}"]
    for stage, extra in {
        "align": components,
        "shrink": ["start=ours/align", *second], "instruct": ["start=ours/shrink"]
    }.items():
        assert not main([stage, *common, *extra, f"output_dir=runs/{stage}", f"hub_model_id=ours/{stage}"])

    commits = [HfApi().model_info(f"ours/{stage}").sha for stage in ("align", "shrink")]
    assert commits[0] in Path("runs/shrink/README.md").read_text()  # the cards name what they began with
    assert all(commit in Path("runs/instruct/README.md").read_text() for commit in commits)
    torch.manual_seed(0)
    processor = SoundwaveProcessor.from_pretrained("runs/instruct")
    model = SoundwaveForConditionalGeneration.from_pretrained("runs/instruct", dtype=torch.float32).eval()
    inputs = processor(audio=[tone(0.6), tone(3.1, 300.0)], sampling_rate=16_000)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    if pinned:  # what the base models' branches hold from now on must not matter
        torch.manual_seed(9)
        for folder in (save_encoder(Path("later/encoder"), seed=7), save_llm(Path("later/llm"), seed=8)):
            HfApi().upload_folder(repo_id=f"parts/{Path(folder).name}", folder_path=folder)
    print(json.dumps({"ids": ids.tolist(), "prompt": inputs["input_ids"].tolist(), "class": type(model).__module__}))
"""

LOAD = """
    import sys
    # None: an import of it fails as if it were not installed, an editable installation included.
    sys.modules |= dict.fromkeys(("soundwave", "peft", "trl", "soundfile", "torchaudio"))
    import json
    import numpy as np
    import torch
    from transformers import AutoModel, AutoModelForCTC, AutoModelForMultimodalLM, AutoProcessor, pipeline

    def tone(seconds, frequency_hz=440.0):
        time_s = np.arange(round(seconds * 16_000)) / 16_000
        return (0.1 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)

    torch.set_num_threads(1)
    clips = [tone(0.6), tone(3.1, 300.0)]
    processor = AutoProcessor.from_pretrained("ours/instruct", trust_remote_code=True)
    inputs = processor(audio=clips, sampling_rate=16_000)
    seen = {"prompt": inputs["input_ids"].tolist()}
    for auto in (AutoModel, AutoModelForMultimodalLM):
        model = auto.from_pretrained("ours/instruct", trust_remote_code=True, dtype=torch.float32)
        seen[auto.__name__] = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    seen["class"] = type(model).__module__
    features = processor.audio_features(clips)
    for stage in ("align", "instruct"):
        ctc = AutoModelForCTC.from_pretrained(f"ours/{stage}", trust_remote_code=True, dtype=torch.float32)
        seen[f"ctc {stage}"] = [len(ids) for ids in ctc.transcribe_ids(**features)]
        recognizer = pipeline("automatic-speech-recognition", model=f"ours/{stage}", trust_remote_code=True)
        seen[f"recognized {stage}"] = [sorted(heard) for heard in recognizer(clips, return_timestamps="word")]
    print(json.dumps(seen))
"""


REFUSED = """
    import sys
    sys.modules |= dict.fromkeys(("soundwave", "peft", "trl", "soundfile", "torchaudio"))
    import json
    from transformers import AutoModel

    said = {}
    for branch in ("lacks", "surplus", "other commit", "gone"):
        try:
            AutoModel.from_pretrained("ours/instruct", revision=branch, trust_remote_code=True)
        except Exception as error:
            said[branch] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
"""


def spoil(hub: LocalHub, name: str, branch: str, path: str, content: bytes) -> None:
    """Make a branch that is main but for one file."""
    repository = hub.read(name)
    files = dict(hub.listing(name)[1])
    oid = hashlib.sha256(content).hexdigest()
    (hub.blobs / oid).write_bytes(content)
    files[path] = {"oid": oid, "size": len(content), "lfs": True}
    sha = hashlib.sha1(branch.encode()).hexdigest()
    repository["commits"][sha], repository["branches"][branch] = files, sha
    hub.write(name, repository)


def run(hub: LocalHub, code: str, cwd: Path, home: str, *arguments: str, isolated: bool = False) -> dict:
    """Run a script that prints one JSON object on its last line."""
    flags = ["-I"] if isolated else []
    path = {} if isolated else {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code), *arguments],
        cwd=cwd,
        env=os.environ | hub.environment(home) | path | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with eight tones and rows of three tasks."""
    data = tmp_path / "work" / "data"
    (data / "wav").mkdir(parents=True)
    rows = []
    for index in range(8):
        soundfile.write(data / "wav" / f"{index}.wav", tone(0.5 + 0.3 * index, 200.0 + 50 * index), 16_000)
        task, instruction = [("asr", "Transcribe the speech."), ("intent", "What is wanted?")][index % 2]
        answer = "red" if index % 2 else "box"
        rows.append({"audio": f"wav/{index}.wav", "task": task, "instruction": instruction, "answer": answer})
        rows[-1] |= {"transcript": answer, "duration_s": 0.5 + 0.3 * index}
    for _ in range(4):
        rows.append({"audio": None, "task": "text_qa", "instruction": "How much is two?", "answer": "two"})
    complete = {"transcript": None, "language": "en", "source": "tones", "duration_s": None}
    lines = [json.dumps({"id": str(index), **complete, **row}) for index, row in enumerate(rows)]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "work"


@pytest.mark.parametrize("pinned", [True, False], ids=["components from the Hub", "components from folders"])
def test_three_stages_to_a_process_without_the_package(pinned, workplace, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        trained = run(hub, TRAIN, workplace, "trainer", json.dumps(pinned))
        away = tmp_path / "away"
        away.mkdir()
        loaded = run(hub, LOAD, away, "user", isolated=True)
        listings = {stage: hub.listing(f"ours/{stage}")[1] for stage in ("align", "shrink", "instruct")}
        texts = {
            (stage, path): hub.content(f"ours/{stage}", path).decode()
            for stage, listing in listings.items()
            for path, entry in listing.items()
            if not entry["lfs"]
        }
        # The first commit is the empty repository, the third what was uploaded after the training.
        commits = {part: list(hub.read(f"parts/{part}")["commits"])[1] for part in ("encoder", "llm") if pinned}
        if pinned:
            weights, config = load(hub.content("ours/instruct", "model.safetensors")), texts["instruct", "config.json"]
            norm = weights.pop("shrinking_adapter.norm.weight")
            spoil(hub, "ours/instruct", "lacks", "model.safetensors", save(weights, {"format": "pt"}))
            weights |= {"shrinking_adapter.norm.weight": norm, "shrinking_adapter.norm.extra": torch.ones(1)}
            spoil(hub, "ours/instruct", "surplus", "model.safetensors", save(weights, {"format": "pt"}))
            empty = list(hub.read("parts/llm")["commits"])[0]
            spoil(hub, "ours/instruct", "other commit", "config.json", config.replace(commits["llm"], empty).encode())
            spoil(hub, "ours/instruct", "gone", "config.json", config.replace(commits["llm"], 40 * "0").encode())
            said = run(hub, REFUSED, away, "user", isolated=True)
            assert "shrinking_adapter.norm.weight" in said["lacks"]
            assert "shrinking_adapter.norm.extra" in said["surplus"]
            assert "parts/llm holds neither model.safetensors nor" in said["other commit"]
            assert "parts/llm" in said["gone"], said["gone"]

    assert trained["class"] == "soundwave.modeling_soundwave.modeling_soundwave"
    assert loaded["class"].startswith("transformers_modules.ours.instruct.")
    assert loaded["prompt"] == trained["prompt"]
    assert all(len(ids) > len(prompt) for ids, prompt in zip(trained["ids"], trained["prompt"], strict=True))
    assert loaded["AutoModel"] == loaded["AutoModelForMultimodalLM"] == trained["ids"]
    assert len(loaded["ctc align"]) == len(loaded["ctc instruct"]) == 2
    assert loaded["recognized align"] == loaded["recognized instruct"] == [["chunks", "text"]] * 2

    for stage, listing in listings.items():
        for name in (
            "config.json",
            "model.safetensors",
            "processor_config.json",
            "stage_config.yaml",
            "train_log.jsonl",
        ):
            assert name in listing, f"{name} is missing from ours/{stage}"
        assert "adapter_config.json" not in listing  # the Auto classes would load its base model instead
        config = json.loads(texts[stage, "config.json"])
        if pinned:
            assert config["audio_model_revision"] == commits["encoder"]
            assert config["text_model_revision"] == commits["llm"]
    for (stage, path), text in texts.items():
        assert str(tmp_path) not in text, f"a path of this machine is in ours/{stage}/{path}"
    sizes = {stage: listing["model.safetensors"]["size"] for stage, listing in listings.items()}
    whole = (workplace / "llm" / "model.safetensors").stat().st_size
    assert (sizes["instruct"] < whole) == pinned, "only components without a Hub commit are saved with the stage"
