"""Tokens and words with times: their texts are the tokenizer's text, for every family and any text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from soundwave.modeling_soundwave.transcripts_soundwave import TimedToken
from soundwave.modeling_soundwave.words_soundwave import FRAME_S, group_words, spread, timed_tokens
from tests.tokenizers import FAMILIES, make_tokenizer


def plain_bytes(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with byte pieces that are ordinary pieces, as in the real families; training made them special."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [added for added in backend["added_tokens"] if not added["content"].startswith("<0x")]
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **special)


TOKENIZERS = {family: plain_bytes(make_tokenizer(family)) for family in FAMILIES}
# Without what stands for broken bytes; without what SentencePiece writes for a space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"), max_size=30)


def frames(count: int) -> list[tuple[int, int, float]]:
    return [(2 * index, 2 * index + 2, 1.0 - index / 1e6) for index in range(count)]


def squeezed(text: str) -> str:
    return "".join(text.split())


def words_of(family: str, text: str) -> list[str]:
    ids = TOKENIZERS[family].encode(text, add_special_tokens=False)
    return [word.text for word in group_words(timed_tokens(TOKENIZERS[family], ids, frames(len(ids))))]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS)
def test_texts_are_the_tokenizers_text(family, text):
    tokenizer = TOKENIZERS[family]
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = timed_tokens(tokenizer, ids, frames(len(ids)))
    words = group_words(tokens)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert squeezed("".join(token.text for token in tokens)) == squeezed(decoded)
    assert "".join(word.text for word in words) == squeezed(decoded)
    assert not any(character.isspace() for word in words for character in word.text)
    assert all(word.text and word.start < word.end for word in words)
    assert all(first.end <= second.start + 1e-9 for first, second in zip(words, words[1:], strict=False))


@pytest.mark.parametrize("family", FAMILIES)
@given(words=st.lists(st.from_regex(r"[a-zà-ÿ'.,!?0-9]{1,6}", fullmatch=True), min_size=1, max_size=6))
def test_spaces_part_words(family, words):
    assert words_of(family, " ".join(words)) == words


@pytest.mark.parametrize("family", FAMILIES)
@given(ids=st.lists(st.integers(0, 450), max_size=40))
def test_any_ids_give_their_whole_characters(family, ids):
    tokenizer = TOKENIZERS[family]
    tokens = timed_tokens(tokenizer, ids, frames(len(ids)))
    text = "".join(token.text for token in tokens)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in decoded:
        assert squeezed(text) == squeezed(decoded)
    assert "".join(word.text for word in group_words(tokens)) == squeezed(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the red boxes, please!", ["the", "red", "boxes,", "please!"]),
        ("你好。世界", ["你", "好。", "世", "界"]),
        ("我用Python写「诗」 ok", ["我", "用", "Python", "写", "「诗」", "ok"]),
        ("กำ า", ["ก", "ำ", "า"]),
        ("naïve 🙂🙂 x", ["naïve", "🙂🙂", "x"]),
    ],
)
def test_words(family, text, words):
    assert words_of(family, text) == words


def test_special_and_unknown_tokens_are_left_out():
    tokenizer = TOKENIZERS["llama3"]
    red = tokenizer.encode(" red", add_special_tokens=False)
    ids = [tokenizer.bos_token_id, *red, 10**6, tokenizer.eos_token_id]
    tokens = timed_tokens(tokenizer, ids, frames(len(ids)), offset_s=1.0)
    assert [token.id for token in tokens] == red
    assert tokens[0].start == pytest.approx(1.0 + 2 * FRAME_S)
    with pytest.raises(ValueError, match="2 token ids came with 1 spans"):
        timed_tokens(tokenizer, red[:1] * 2, frames(1))


def test_a_character_of_several_tokens_lasts_for_all_of_them():
    tokenizer = TOKENIZERS["qwen3"]
    ids = tokenizer.encode("中a", add_special_tokens=False)
    assert len(ids) == 4  # three bytes and a letter
    tokens = timed_tokens(tokenizer, ids, frames(4))
    assert [token.text for token in tokens] == ["中", "", "", "a"]
    word, letter = group_words(tokens)
    assert (word.start, word.end) == pytest.approx((0.0, 6 * FRAME_S))
    assert word.confidence == tokens[2].confidence
    assert (letter.start, letter.end) == pytest.approx((6 * FRAME_S, 8 * FRAME_S))


def test_characters_share_the_time_of_their_token():
    words = group_words([TimedToken(0, " 你好", 1.0, 2.0, 0.5), TimedToken(1, "!", 3.0, 3.5, 0.25)])
    assert [(word.text, word.start, word.end, word.confidence) for word in words] == [
        ("你", 1.0, 1.5, 0.5),
        ("好!", 1.5, 3.5, 0.25),
    ]


@given(st.data())
def test_spans_hold_their_peaks_and_do_not_overlap(data):
    steps = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=12))
    peaks, frame = [], 0
    for gap, length in steps:
        peaks.append((frame + gap, frame + gap + length, 0.5))
        frame += gap + length
    spans = spread(peaks, frame + 3)
    assert all(
        a[0] <= b[0] and b[1] <= a[1] and a[1] <= frame + 3 for a, b in zip(spans, peaks, strict=True) if b[0] < b[1]
    )
    loud = [span for span in spans if span[0] < span[1]]
    assert all(a[1] <= b[0] for a, b in zip(loud, loud[1:], strict=False))
