"""Gradient checkpointing in a frozen LLM: it holds in evaluation mode, and changes nothing but memory and time."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from soundwave.training.data import load_rows
from soundwave.training.generating import AnswerCheck
from soundwave.training.recomputing import recompute_in_evaluation
from tests.tiny_trainers import build_trainer
from tests.training_rows import write_rows

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 60, "bos_token_id": 1}
LLMS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, attention_dropout=0.5),
    # Drops out in the layer itself, as the layer's own mode says.
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_rows(write_rows(tmp_path_factory.mktemp("rows")))


@pytest.fixture(params=LLMS)
def llm(request):
    """A frozen LLM, in evaluation mode, and its checkpointed copy."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(LLMS[request.param]).requires_grad_(False).eval()
    checkpointed = copy.deepcopy(plain)
    recompute_in_evaluation(checkpointed)
    checkpointed.activation_checkpointing_enable()
    return plain, checkpointed


def scores_and_gradient(llm, **options):
    """Of embeddings (2, 9, D): scores, their gradient, and the bytes that autograd keeps of the pass."""
    torch.manual_seed(1)
    embeds = torch.randn(2, 9, 32, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in llm.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = llm(inputs_embeds=embeds, attention_mask=torch.ones(2, 9), **options).logits
    scores.logsumexp(-1).sum().backward()
    return scores, embeds.grad, sum(kept.values())


def test_less_is_kept_and_the_gradient_is_the_same(llm):
    plain, checkpointed = (scores_and_gradient(each, use_cache=False) for each in llm)
    assert torch.equal(plain[0], checkpointed[0]) and torch.equal(plain[1], checkpointed[1])
    assert checkpointed[2] < plain[2] / 2


def test_a_call_with_a_cache_is_not_run_twice(llm):
    plain, checkpointed = (scores_and_gradient(each, use_cache=True) for each in llm)
    assert torch.equal(plain[0], checkpointed[0]) and torch.equal(plain[1], checkpointed[1])
    ids = [each.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=6, do_sample=False) for each in llm]
    assert torch.equal(*ids)


def test_it_can_be_switched_off_and_copied(llm):
    plain, checkpointed = llm
    again = copy.deepcopy(checkpointed)
    checkpointed.activation_checkpointing_disable()
    expected = scores_and_gradient(plain, use_cache=False)
    assert scores_and_gradient(checkpointed, use_cache=False)[2] == expected[2]
    assert scores_and_gradient(again, use_cache=False)[2] < expected[2] / 2


@pytest.mark.parametrize("stage", ["shrink", "instruct"])
@pytest.mark.parametrize("trains", [["shrinking_adapter"], ["shrinking_adapter", "lora"]], ids="-".join)
def test_a_run_ends_with_the_same_bits(rows, tiny_model, processor, tmp_path, stage, trains):
    """Validations in between included; a layer that passes gradients on runs twice, one of the frozen encoder once."""

    def run(checkpointing):
        passes = {"audio_tower": 0, "language_model": 0}
        trainer = build_trainer(
            stage,
            tiny_model,
            processor,
            rows,
            tmp_path / f"checkpointing-{checkpointing}",
            eval_rows=rows.select(range(6)),
            answer_check=AnswerCheck(2, 4),
            trains=trains,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=3,
            activation_checkpointing=checkpointing,
        )
        for part in passes:
            modules = trainer.model.get_submodule(part).modules()
            layer = next(module for module in modules if isinstance(module, GradientCheckpointingLayer))
            # The layer's first child: hooks of the layer itself are not called when it is recomputed.
            next(child for child in layer.children() if "Norm" in type(child).__name__).register_forward_hook(
                lambda *_, part=part: passes.update({part: passes[part] + trainer.model.training})
            )
        trainer.train()
        log = [json.loads(line) for line in open(trainer.args.output_dir + "/train_log.jsonl")]
        told = ("grad_norm", "eval_wer", *(name for entry in log for name in entry if "loss" in name))
        figures = [{name: entry[name] for name in told if name in entry} for entry in log]
        return trainer.model.state_dict(), figures, passes

    weights, figures, passes = run(False)
    again, figures_again, passes_again = run(True)
    assert figures == figures_again
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert passes_again == {"audio_tower": passes["audio_tower"], "language_model": 2 * passes["language_model"]}
