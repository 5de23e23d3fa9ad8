"""Stage 0b: a small Llama-style language model from nothing, on answers to text in the place of speech.

It stands in for Llama. The loss is on answers only: with loss on the user's text as well, copying, which recognition
needs later, does not emerge within the budget (measured). Shapes: B batch, L positions, D width, V vocabulary.
"""

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soundwave.training.tiny.pretrain_encoder import cosine_rate
from soundwave.training.tiny.tokenizer import SYSTEM_PROMPT, build_tokenizer

IGNORED = -100


@dataclass(frozen=True)
class LanguageModelSettings:
    """Size and schedule of stage 0b."""

    hidden: int = 128
    intermediate: int = 320
    layers: int = 3
    heads: int = 4
    steps: int = 2200
    batch: int = 48
    learning_rate: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.01
    without_system: float = 0.1  # share of examples without a system prompt
    log_every: int = 50
    repeat_gate: float = 0.95
    translation_gate: float = 0.95

    @classmethod
    def smoke(cls) -> "LanguageModelSettings":
        """Return settings that take a second or two, for tests."""
        return cls(steps=12, batch=8, warmup=4, log_every=4)


def read_examples(path: Path) -> list[dict]:
    """Return the examples of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_text(example: dict, tokenizer: PreTrainedTokenizerFast, system: bool = True) -> str:
    """Return the prompt of an example: its content stands exactly where a recording will stand."""
    user = f"{example['content']} {example['instruction']}".strip()
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if system else []
    messages.append({"role": "user", "content": user})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _tokenize(
    examples: list[dict], tokenizer: PreTrainedTokenizerFast, without_system: float, rng: np.random.Generator
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, answer ids) of each example."""
    prompts = [prompt_text(example, tokenizer, rng.random() >= without_system) for example in examples]
    answers = [example["answer"] for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(prompt, answer + end) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]


def _batches(items: list[tuple[list[int], list[int]]], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Return one epoch of batches (as indices) of similar length, in random order."""
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in items])
    order = np.argsort(lengths * rng.uniform(0.85, 1.15, len(items)))
    batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def _collate(items: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and labels (B, L), padded on the right; only answers are labelled."""
    longest = max(len(prompt) + len(answer) for prompt, answer in items)
    ids = torch.full((len(items), longest), pad)
    labels = torch.full((len(items), longest), IGNORED)
    for row, (prompt, answer) in enumerate(items):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the labelled tokens; only their positions reach the head.

    Padding is on the right, so causal attention alone keeps it out.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, L-1, D)
    targets = labels[:, 1:]
    known = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[known]), targets[known])


@torch.no_grad()
def answer_texts(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[dict],
    max_new_tokens: int = 80,
    batch: int = 100,
) -> list[str]:
    """Return the model's greedy answers to the examples."""
    answers = []
    for start in range(0, len(examples), batch):
        prompts = [prompt_text(example, tokenizer) for example in examples[start : start + batch]]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def exact_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[dict]
) -> dict[str, float]:
    """Return the share of exactly right answers of each task."""
    hits: dict[str, list[bool]] = defaultdict(list)
    answers = answer_texts(model, tokenizer, examples)
    for example, answer in zip(examples, answers, strict=True):
        hits[example["task"]].append(answer == example["answer"])
    return {task: round(float(np.mean(values)), 4) for task, values in sorted(hits.items())}


def new_language_model(settings: LanguageModelSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained model. Embeddings are untied: with tied ones neither copying nor translation emerged."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain_llm(
    corpus: str | Path,
    output: str | Path,
    settings: LanguageModelSettings | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> dict:
    """Train tokenizer and language model on a corpus folder and save both.

    Args:
        corpus: folder with `text/train.jsonl`, `text/dev.jsonl` and the rows of the later stages (for their words).
        output: folder to write, which `AutoModelForCausalLM` and `AutoTokenizer` read.
        settings: size and schedule.
        seed: of initialisation and batches.
        threads: processor threads; left alone if not given.
        progress: show a progress bar.

    Returns:
        Figures: steps, seconds, loss curve, share of exact answers per task on the development sentences, gates.
    """
    settings, start = settings or LanguageModelSettings(), time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    corpus = Path(corpus)
    tokenizer = build_tokenizer(corpus, output)
    items = _tokenize(read_examples(corpus / "text/train.jsonl"), tokenizer, settings.without_system, rng)
    model = new_language_model(settings, tokenizer)
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    queue: list[list[int]] = []
    bar = tqdm(
        range(settings.steps),
        desc="stage 0b, language model",
        unit="step",
        disable=not progress,
        position=int(progress),
    )
    for step in bar:
        queue = queue or _batches(items, settings.batch, rng)
        loss = answer_loss(model, *_collate([items[index] for index in queue.pop()], tokenizer.pad_token_id))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine_rate(step, settings.steps, settings.warmup)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % settings.log_every == 0:
            curve.append((step + 1, round(float(np.mean(losses)), 4)))
            losses = []
            bar.set_postfix(loss=curve[-1][1])
    model.eval()
    exact = exact_answers(model, tokenizer, read_examples(corpus / "text/dev.jsonl"))
    model.save_pretrained(output)
    figures = {
        "steps": settings.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "loss_curve": curve,
        "dev_exact": exact,
        "gates": [
            {"name": name, "at_least": gate, "passed": exact.get(task, 0.0) >= gate}
            for name, task, gate in (
                ("text repeat", "asr", settings.repeat_gate),
                ("text translation", "st", settings.translation_gate),
            )
            if task in exact  # a corpus of recordings has no translations
        ],
    }
    (Path(output) / "pretraining.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return figures
