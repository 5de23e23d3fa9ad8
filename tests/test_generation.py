"""What `generate` promises around drafts and the LLM's context: outputs, refusals, streaming, stopping."""

import pytest
import torch
from transformers import Lfm2Config, Llama4TextConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from soundwave.modeling_soundwave import drafting_soundwave, verifying_soundwave
from soundwave.modeling_soundwave.generation_soundwave import ContextError
from tests.test_drafting import LLMS, SIZES
from tests.test_modeling import batch_of, mel
from tests.tiny_models import VOCABULARY, tiny_model

ROWS = [[3, mel(30, 1), 5], [4, 9, 8], [mel(60, 2)]]


@pytest.fixture(scope="module")
def model():
    return tiny_model(text_config=LLMS["full"])


def edited(plain: torch.Tensor) -> list[list[int]]:
    """Drafts of (B, new) answers with a token wrong, one missing and one too many."""
    return [[*ids[:3], 7, *ids[4:7], *ids[8:12], 7, *ids[12:]] for ids in plain.tolist()]


class Keep(BaseStreamer):
    """Remembers what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class AfterPair(StoppingCriteria):
    """Ends a row that says two tokens in a row whose ids add up to a multiple of 4."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] + input_ids[:, -2]) % 4 == 0


def test_plain_decoding_counts_its_forwards_and_keeps_the_librarys_fields(model):
    out = model.generate(**batch_of(ROWS), max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    assert out.llm_forwards == 5 == len(out.logits) and out.draft_tokens is None
    beams = model.generate(
        **batch_of(ROWS), max_new_tokens=5, num_beams=2, return_dict_in_generate=True, output_scores=True
    )
    assert beams.sequences_scores.shape == (3,) and beams.llm_forwards >= 5


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_a_stopping_criterion_ends_a_drafted_answer_where_it_ends_a_plain_one(model, rows):
    batch = batch_of(rows)
    options = {"max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([AfterPair()])}
    plain = model.generate(**batch, **options)
    free = model.generate(**batch, max_new_tokens=24)[:, batch["input_ids"].shape[1] :]
    assert plain.shape[1] < batch["input_ids"].shape[1] + 24
    assert torch.equal(model.generate(**batch, **options, ctc_draft=free.tolist()), plain)
    endless = options | {"eos_token_id": None}  # a row that ended goes on until all have
    plain = model.generate(**batch, **endless)
    assert torch.equal(model.generate(**batch, **endless, ctc_draft=free.tolist()), plain)


@pytest.mark.parametrize("criteria", [[], [AfterPair()]])  # by the library's loop and by ours
def test_a_streamer_gets_every_token_once(model, criteria):
    batch, plain, drafted = batch_of(ROWS[:1]), Keep(), Keep()
    options = {"max_new_tokens": 16, "stopping_criteria": StoppingCriteriaList(criteria)}
    ids = model.generate(**batch, **options, streamer=plain)
    model.generate(**batch, **options, streamer=drafted, ctc_draft=edited(ids[:, 3:]))
    assert sum(drafted.parts, []) == sum(plain.parts, []) and plain.ended and drafted.ended
    assert len(drafted.parts) < len(plain.parts)


def test_one_drafted_row_gives_scores_and_a_configuration_may_say_what_to_do(model):
    batch = batch_of(ROWS[:1])
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**batch, **options)
    drafts = edited(plain.sequences[:, 3:])
    drafted = model.generate(**batch, **options, ctc_draft=drafts)
    torch.testing.assert_close(torch.stack(drafted.scores), torch.stack(plain.scores))
    configuration = model.generation_config.__class__(max_new_tokens=12)
    again = model.generate(**batch, generation_config=configuration, ctc_draft=drafts)
    assert torch.equal(again, plain.sequences) and configuration.prompt_lookup_num_tokens is None


def test_drafts_of_kept_recordings_are_empty_and_of_new_ones_in_their_rows(model):
    batch = batch_of([[3, mel(30, 1)], [4, mel(60, 2), 9, mel(20, 3)]])
    heard = model.transcribe_ids(**{name: batch[name] for name in model.AUDIO_FEATURES if name in batch})
    out = model.generate(**batch, max_new_tokens=2, ctc_draft=True, return_dict_in_generate=True)
    assert out.draft_tokens.tolist() == [len(heard[0]), len(heard[1]) + len(heard[2])]
    first, rest = batch_of([[mel(30, 1)]]), batch_of([[4, mel(60, 2), 9, mel(20, 3)]])
    first.pop("input_ids"), first.pop("attention_mask")
    kept = model.get_audio_features(**first)
    mixed = {"audio_embeds": kept.embeds, "audio_lengths": kept.lengths, **rest}
    mixed |= {name: batch[name] for name in ("input_ids", "attention_mask")}
    again = model.generate(**mixed, max_new_tokens=2, ctc_draft=True, return_dict_in_generate=True)
    assert again.draft_tokens.tolist() == [0, len(heard[1]) + len(heard[2])]
    assert torch.equal(again.sequences, out.sequences)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_confident_tokens_are_taken_over_only_when_asked_for(model, rows):
    batch = batch_of(rows)
    heard = model.transcribe_ids(**{name: batch[name] for name in model.AUDIO_FEATURES if name in batch})
    options = {"max_new_tokens": 70, "ctc_draft": True, "return_dict_in_generate": True, "eos_token_id": None}
    lossy = model.generate(**batch, **options, draft_confidence=1e-9)
    answers = lossy.sequences[:, batch["input_ids"].shape[1] :].tolist()
    drafts = [heard[0]] if len(rows) == 1 else [heard[0], [], heard[1]]
    assert all(answer[: len(draft)] == draft for answer, draft in zip(answers, drafts, strict=True))
    assert lossy.draft_accepted.tolist() == [len(draft) for draft in drafts]
    sure = model.generate(**batch, **options, draft_confidence=1.0)
    assert torch.equal(sure.sequences, model.generate(**batch, **options).sequences)
    assert not torch.equal(sure.sequences, lossy.sequences)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ctc_draft": [[3]]}, "1 drafts for 3 rows"),
        ({"ctc_draft": [[3], [], [VOCABULARY]]}, f"holds \\[{VOCABULARY}\\]"),
        ({"ctc_draft": True, "do_sample": True}, "greedy"),
        ({"ctc_draft": True, "num_beams": 2}, "greedy"),
        ({"ctc_draft": True, "num_return_sequences": 2}, "num_return_sequences"),
        ({"ctc_draft": True, "cache_implementation": "static"}, "dynamic"),
        ({"ctc_draft": True, "output_scores": True, "return_dict_in_generate": True}, "single row"),
        ({"ctc_draft": True, "assistant_model": object()}, "both draft"),
        ({"draft_confidence": 0.9}, "give ctc_draft=True"),
        ({"ctc_draft": [[], [], []], "draft_confidence": 0.9}, "ctc_draft=True"),
        ({"ctc_draft": True, "draft_confidence": 95}, "probability"),
    ],
)
def test_drafts_that_fit_nothing_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**batch_of(ROWS), max_new_tokens=4, **options)


def test_a_long_draft_is_verified_in_blocks(model, monkeypatch):
    for module in (drafting_soundwave, verifying_soundwave):
        monkeypatch.setattr(module, "TOKENS_PER_FORWARD", 8)
    monkeypatch.setattr(verifying_soundwave, "FEWEST_PER_ROW", 4)
    for rows, forwards in ((ROWS[:1], 3), (ROWS, 5)):  # blocks of 8 or 4, and a token of the LLM's own behind each
        batch = batch_of(rows)
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "return_dict_in_generate": True}
        plain = model.generate(**batch, **options).sequences
        drafts = plain[:, batch["input_ids"].shape[1] :].tolist()
        out = model.generate(**batch, **options, ctc_draft=drafts)
        assert out.llm_forwards == forwards and torch.equal(out.sequences, plain)


@pytest.mark.parametrize(
    "text_config",
    [
        Lfm2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, layer_types=["conv", "full_attention"]),
        Llama4TextConfig(
            **SIZES,
            attention_chunk_size=8,
            intermediate_size_mlp=64,
            moe_layers=[],
            layer_types=["chunked_attention"] * 2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_an_llm_whose_cache_cannot_be_rolled_back_decodes_plainly(text_config):
    model, batch = tiny_model(text_config=text_config), batch_of(ROWS)
    plain = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True)
    drafts = plain.sequences[:, batch["input_ids"].shape[1] :].tolist()
    drafted = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, ctc_draft=drafts)
    assert torch.equal(drafted.sequences, plain.sequences) and drafted.llm_forwards == plain.llm_forwards == 8
    assert drafted.draft_accepted.tolist() == [0, 0, 0]


def test_kept_embeddings_alone_have_no_draft(model):
    batch = batch_of(ROWS[2:])
    ids = batch.pop("input_ids")
    kept = model.get_audio_features(**{name: batch[name] for name in model.AUDIO_FEATURES if name in batch})
    with pytest.raises(ValueError, match="only audio_embeds came"):
        model.generate(ids, audio_embeds=kept.embeds, audio_lengths=kept.lengths, ctc_draft=True)


def test_a_prompt_that_fills_the_context_is_refused_and_an_answer_is_cut_to_it(model, caplog):
    batch = batch_of(ROWS)
    longest = int(model(**batch).audio_positions.max()) + 2
    model = tiny_model(text_config=LLMS["full"].__class__(**LLMS["full"].to_dict() | {"max_position_embeddings": 64}))
    text = torch.full((1, 64), 5)
    with pytest.raises(ContextError, match="takes 64 positions.*64 .*64 positions of text and 0 of recordings"):
        model.generate(text)
    with pytest.raises(ContextError, match="max_audio_positions"):
        model.generate(**batch_of([[mel(110, n) for n in range(4)]]))
    assert model.generate(text[:, :60], max_new_tokens=9, eos_token_id=None).shape == (1, 64)
    assert model.generate(text[:, :60], max_new_tokens=4, eos_token_id=None).shape == (1, 64)
    assert longest < 64
