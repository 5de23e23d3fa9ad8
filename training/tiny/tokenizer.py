"""The tiny language model's tokenizer: byte-level BPE in which every word of the corpus is one token.

All 256 bytes stay in the vocabulary, so any text can be written and nothing vanishes. Sound labels (`<cough>`) are
ordinary pieces of text that happen to be one token. Text after a control token gets a leading space, so that a
transcript has the same ids as an answer and as a CTC label.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYSTEM_PROMPT = "You are a helpful language and speech assistant."
AUDIO_TOKEN = "<|audio|>"
CONTROL_TOKENS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eot|>",
}
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
LARGEST_VOCABULARY = 2_000  # never reached: training stops when every word is one token
# A label such as <cough>, a word, a digit, or one other character; Ġ is the space of the byte-level alphabet.
PIECES = r"Ġ?<[a-z_]+>|Ġ?[^Ġ\sĊ0-9.,:;!?<>'\"()|_-]+|Ġ?[0-9]|Ġ?[.,:;!?<>'\"()|_-]|Ġ|Ċ"
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for item in message['content'] -%}"
    "{{- '<|audio|>' if item['type'] == 'audio' else item['text'] -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer for which each word of the texts, with a space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=[*CONTROL_TOKENS.values(), *ROLE_TOKENS, AUDIO_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # One occurrence of each word: common words would otherwise decide which pieces rare ones are made of.
    words = sorted({word for text in texts for word in text.replace(".", " .").replace("?", " ?").split()})
    tokenizer.train_from_iterator([*words, ".", "?", ":"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **CONTROL_TOKENS,
        extra_special_tokens={"audio_token": AUDIO_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.add_special_tokens({"additional_special_tokens": [*ROLE_TOKENS]}, replace_extra_special_tokens=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def corpus_texts(corpus: str | Path) -> list[str]:
    """Return all training text of a corpus folder: stage 0 examples, instructions and answers of every task."""
    corpus = Path(corpus)
    texts = [SYSTEM_PROMPT]
    for path in [*sorted((corpus / "train").glob("*.jsonl")), corpus / "text/train.jsonl"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts += [row[key] for key in ("content", "instruction", "answer", "transcript") if row.get(key)]
    return texts


def build_tokenizer(corpus: str | Path, output: str | Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer on a corpus folder, save it to `output` and return it."""
    tokenizer = train_tokenizer(corpus_texts(corpus))
    tokenizer.save_pretrained(output)
    return tokenizer
