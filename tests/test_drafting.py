"""Drafted decoding gives the ids of plain greedy decoding, whatever the draft, and in fewer forwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

from soundwave.modeling_soundwave.drafting_soundwave import Draft
from tests.test_modeling import batch_of, conversations, mel
from tests.tiny_models import VOCABULARY, tiny_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # an LLM that does not repeat itself
}
LLMS = {
    "full": LlamaConfig(**SIZES),
    "sliding": MistralConfig(**SIZES, sliding_window=6),
    "mixed": Gemma3TextConfig(
        **SIZES,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    ),
}
TOKEN = st.integers(0, VOCABULARY - 1)
ENDS = [2, 16, 30]  # tokens that the random LLMs say often


@pytest.fixture(scope="module", params=LLMS)
def model(request):
    return tiny_model(text_config=LLMS[request.param])


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5))
def test_a_draft_goes_on_where_it_is_nearest_to_the_answer(tokens, pieces):
    draft, answer = Draft(tokens), []
    for piece in pieces:
        draft.advance(piece)
        answer += piece
        distances = [edit_distance(answer, tokens[:n]) for n in range(len(tokens) + 1)]
        assert distances[draft.position] == min(distances)
        assert draft.block(3) == tokens[draft.position : draft.position + 3]


@pytest.mark.parametrize(
    "answer, rest",
    [
        ([10, 11, 12], [13, 14, 15]),
        ([10, 99], [12, 13, 14, 15]),  # another token
        ([10, 12], [13, 14, 15]),  # one of the draft's is missing
        ([10, 99, 11], [12, 13, 14, 15]),  # one too many
        ([98, 99, 10, 11], [12, 13, 14, 15]),  # something before it
        ([10, 11, 12, 13, 14, 15, 99, 99], []),
    ],
)
def test_a_draft_is_realigned_after_a_mismatch(answer, rest):
    draft = Draft([10, 11, 12, 13, 14, 15])
    for token in answer:
        draft.advance([token])
    assert draft.block(9) == rest


@st.composite
def corrupted(draw, answer: list[int]) -> list[int]:
    """A draft of an answer: right, partly right, wrong, empty, too long, ids of an end in the middle."""
    kind = draw(st.sampled_from(["right", "edited", "edited", "wrong", "empty", "long"]))
    if kind in ("wrong", "empty"):
        return draw(st.lists(TOKEN, min_size=1, max_size=30)) if kind == "wrong" else []
    draft = list(answer)
    for _ in range(draw(st.integers(1, 4)) if kind == "edited" else 0):
        at = draw(st.integers(0, len(draft)))
        draft[at : at + draw(st.integers(0, 2))] = draw(st.lists(st.one_of(TOKEN, st.sampled_from(ENDS)), max_size=2))
    return draft + draw(st.lists(TOKEN, min_size=1, max_size=30)) if kind == "long" else draft


OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(3, 20)},
    optional={
        "eos_token_id": st.just(ENDS),
        "repetition_penalty": st.just(1.3),
        "min_new_tokens": st.just(3),
        "no_repeat_ngram_size": st.just(2),
        "sequence_bias": st.just({(16,): 2.0, (4, 5): 3.0}),
        "suppress_tokens": st.just([16, 41]),
    },
)


@given(conversations(), st.data(), OPTIONS, st.booleans(), st.integers(0, 8))
@settings(max_examples=25)
def test_drafted_ids_equal_plain_ones(model, rows, data, options, pad_left, pad_to):
    rows = rows + data.draw(st.sampled_from([[], [[4, 9, 8]]]))
    batch = batch_of(rows, pad_to, pad_left)
    N = batch["input_ids"].shape[1]
    plain = model.generate(**batch, **options, return_dict_in_generate=True)
    drafts = [data.draw(corrupted(answer)) for answer in plain.sequences[:, N:].tolist()]
    drafted = model.generate(**batch, **options, ctc_draft=drafts, return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert drafted.llm_forwards <= plain.llm_forwards == plain.sequences.shape[1] - N
    assert drafted.draft_tokens.tolist() == [len(draft) for draft in drafts]
    by_ctc = model.generate(**batch, **options, ctc_draft=True)
    assert torch.equal(by_ctc, plain.sequences)


@pytest.mark.parametrize("rows", [[[3, mel(30, 1), 5]], [[3, mel(30, 1), 5], [4, 9, 8], [mel(60, 2)]]])
def test_a_right_draft_costs_one_forward_and_a_wrong_token_one_more(model, rows):
    batch = batch_of(rows)
    plain = model.generate(**batch, max_new_tokens=24, min_new_tokens=24)[:, batch["input_ids"].shape[1] :]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "return_dict_in_generate": True}
    right = model.generate(**batch, **options, ctc_draft=plain.tolist())
    assert right.llm_forwards == 1 and right.draft_accepted.tolist() == [24] * len(rows)
    wrong = plain.clone()
    wrong[:, 9] = (wrong[:, 9] + 1) % VOCABULARY
    out = model.generate(**batch, **options, ctc_draft=wrong.tolist())
    assert out.llm_forwards <= 3  # where a token comes twice, an omission is as likely as another token
    assert min(out.draft_accepted.tolist()) >= 22
    assert model.generate(**batch, **options, ctc_draft=[[]] * len(rows)).llm_forwards == 24


@pytest.fixture(scope="module")
def trained():
    """The trained tiny model in fp32, and sentences spoken by voices it never heard."""
    import random

    from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
    from soundwave.assets import TINY
    from soundwave.training.tiny.grammar import draw_split
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    texts = [sentence.text for sentence in draw_split(random.Random(7), "test", 24, distinct=True)]
    jobs = [Job(f"u{i}", (text,), UNSEEN_VOICES[i % len(UNSEEN_VOICES)], i, False) for i, text in enumerate(texts)]
    return model, SoundwaveProcessor.from_pretrained(TINY), [speak(job).samples for job in jobs]


@pytest.mark.parametrize("batch_size", [1, 6])
def test_the_trained_model_transcribes_in_a_third_of_the_forwards(trained, batch_size):
    """fp32: ids may differ only from a place on where the two best scores are nearly equal."""
    model, processor, waveforms = trained
    forwards, flips = [0, 0], 0
    for start in range(0, len(waveforms), batch_size):
        batch = processor(audio=waveforms[start : start + batch_size], sampling_rate=16_000)
        options = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
        plain = model.generate(**batch, **options, output_logits=True)
        drafted = model.generate(**batch, **options, ctc_draft=True)
        forwards = [forwards[0] + plain.llm_forwards, forwards[1] + drafted.llm_forwards]
        N = batch["input_ids"].shape[1]
        for row, (a, b) in enumerate(zip(plain.sequences[:, N:], drafted.sequences[:, N:], strict=True)):
            if a[: len(b)].tolist() != b[: len(a)].tolist():
                first = int((a[: len(b)] != b[: len(a)]).nonzero()[0])
                best = plain.logits[first][row].topk(2).values
                assert best[0] - best[1] < 1e-4
                flips += 1
    assert forwards[1] * 3 <= forwards[0] and flips <= 1
