"""Run by two processes: a model cut as the FSDP2 launch file says, against the whole one (`test_distributed.py`)."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.training.freezing import freeze
from soundwave.training.lora import add_lora
from soundwave.training.stages import STAGES
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_config, tiny_model

LAUNCH = Path(__file__).parents[1] / "training" / "launch" / "fsdp2.yaml"
SPOKEN = [[3, mel(100, 1), 5, 6], [4, mel(9, 2), 7, mel(60, 3), 8], [9, 4, 5]]  # several windows of unlike lengths
WRITTEN = [[3, 4, 5], [6, 7, 8, 9]]


def make(stage: str, tied_llm: bool = False) -> torch.nn.Module:
    """A tiny model in float64, its trained parts in training mode but without dropout."""
    if stage == "align":
        torch.manual_seed(0)
        model = SoundwaveForCTC(tiny_config()).double()
        model.ctc_head.init_from_embeddings(torch.randn_like(model.ctc_head.weight))
    else:
        fields = {}
        if tied_llm:
            fields["text_config"] = tiny_config().text_config
            fields["text_config"].tie_word_embeddings = True
        model = tiny_model(**fields)
        add_lora(model, 4, 8, ["q_proj", "v_proj"])
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # which begin at 0, and would leave the others without a gradient
                torch.nn.init.normal_(parameter, std=0.1)
    freeze(model, STAGES[stage].trains)
    model.double().train()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def batch(stage: str, rank: int) -> dict:
    """What a process gets: recordings, or in the later stages, for the second one, text alone."""
    written = stage != "align" and rank == 1
    inputs = batch_of(WRITTEN if written else SPOKEN, labels=True)
    if stage == "align":
        inputs = {
            name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")
        }
        inputs = {name: value[: 1 + rank] if name == "windows_per_audio" else value for name, value in inputs.items()}
        n_windows = int(inputs["windows_per_audio"].sum())
        inputs = {name: value[:n_windows] if name != "windows_per_audio" else value for name, value in inputs.items()}
    if stage != "instruct" and not written:
        n_audios = len(inputs["windows_per_audio"])
        inputs["ctc_labels"] = torch.tensor([[5, 6], [7, 0], [9, 3]])[:n_audios]
        inputs["ctc_label_lengths"] = torch.tensor([2, 1, -1])[:n_audios]
    return inputs


def cut(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """As `accelerate` does it with the launch file; its own switch for FSDP is off on a CPU."""
    settings = yaml.safe_load(LAUNCH.read_text())["fsdp_config"]
    named = ("fsdp_version", "reshard_after_forward", "auto_wrap_policy", "cpu_ram_efficient_loading")
    values = {name: settings[name if name.startswith("fsdp") else f"fsdp_{name}"] for name in named}
    plugin = FullyShardedDataParallelPlugin(**values)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def compare(name: str, stage: str, folder: Path, rank: int, world: int, **settings) -> None:
    """Losses, gradients, an update, and the saved result of the cut model and of the whole one."""
    whole = make(stage, **settings)
    model = cut(copy.deepcopy(whole), world)
    assert sum(isinstance(module, torch.distributed.fsdp.FSDPModule) for module in model.modules()) >= 3
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (whole, model)]
    for _ in range(2):
        losses = [whole(**batch(stage, other)).loss for other in range(world)]
        (sum(losses) / world).backward()
        loss = model(**batch(stage, rank)).loss
        torch.testing.assert_close(loss, losses[rank], rtol=1e-9, atol=1e-9)
        loss.backward()
        cut_gradients = dict(model.named_parameters())
        for key, parameter in whole.named_parameters():
            if parameter.requires_grad:
                gradient = cut_gradients[key].grad
                assert isinstance(gradient, DTensor), key
                torch.testing.assert_close(gradient.full_tensor(), parameter.grad, rtol=1e-7, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)
    if rank == 0:
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(gathered[key], value, rtol=1e-9, atol=1e-9)
        model.save_pretrained(folder / name, state_dict=gathered)
        kind = SoundwaveForCTC if stage == "align" else SoundwaveForConditionalGeneration
        again = kind.from_pretrained(folder / name, dtype=torch.float64)
        assert again.config.architectures == [kind.__name__]
        assert (folder / name / f"{kind.__module__.rpartition('.')[2]}.py").is_file()
        torch.testing.assert_close(again.alignment_adapter.state_dict(), whole.alignment_adapter.state_dict())
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    place = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for stage in STAGES:
        compare(stage, stage, Path(sys.argv[1]), *place)
    compare("tied", "shrink", Path(sys.argv[1]), *place, tied_llm=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
