"""What people do with any model of the library: streamers, sampling, beams, attention, types, checkpointing."""

import random
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TextIteratorStreamer, TextStreamer

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.assets import TINY
from soundwave.modeling_soundwave import SoundwaveConfig
from soundwave.training.tiny.grammar import draw_split
from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
from soundwave.training.tiny.utterances import Job, speak
from tests.test_modeling import batch_of, mel
from tests.tiny_models import WINDOW_MEL_FRAMES, tiny_config, tiny_model

MARGINS = {torch.bfloat16: 5e-2, torch.float16: 5e-2}  # of the two best scores, below which an id may flip


def spoken(count: int) -> tuple[list[str], list]:
    """Sentences that no training heard, in unheard voices: (texts, waveforms of 16 kHz)."""
    texts = [sentence.text for sentence in draw_split(random.Random(5), "test", count, distinct=True)]
    jobs = [Job(f"u{i}", (text,), UNSEEN_VOICES[i % len(UNSEEN_VOICES)], i, False) for i, text in enumerate(texts)]
    return texts, [speak(job).samples for job in jobs]


@pytest.fixture(scope="module")
def rows() -> dict:
    """A recording of several windows, a row of text, and two recordings in a row; padded on the left."""
    return batch_of([[3, mel(90, 1), 5], [4, 6, 7], [mel(30, 2), 9, mel(4, 3)]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained():
    """The trained small model, its processor, and the inputs of one sentence."""
    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    processor = SoundwaveProcessor.from_pretrained(TINY)
    return model, processor, processor(audio=spoken(1)[1], sampling_rate=16_000)


# --- generate -----------------------------------------------------------------------------------------------------


def test_a_text_streamer_shows_the_prompt_as_it_was_given(trained, capsys):
    model, processor, inputs = trained
    ids = model.generate(**inputs, max_new_tokens=32, streamer=TextStreamer(processor.tokenizer))[0]
    assert capsys.readouterr().out.strip() == processor.tokenizer.decode(ids)
    assert processor.tokenizer.decode(ids).count(processor.audio_token) == 1
    model.generate(**inputs, max_new_tokens=32, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    answer = processor.tokenizer.decode(ids[inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == answer.strip()


def test_an_iterating_streamer_yields_the_answer_alone(trained):
    model, processor, inputs = trained
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 32, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    ids = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    assert len(pieces) > 2
    assert "".join(pieces).strip() == processor.decode(ids, skip_special_tokens=True).strip()


def test_stop_strings_end_the_answer(trained):
    model, processor, inputs = trained
    words = spoken(1)[0][0].split()
    ids = model.generate(**inputs, max_new_tokens=32, stop_strings=[words[2]], tokenizer=processor.tokenizer)
    assert processor.decode(ids[0, inputs["input_ids"].shape[1] :]).split() == words[:3]


def test_sampling_follows_the_seed():
    model, batch = tiny_model(), batch_of([[3, mel(60, 1), 5], [4]])
    options = {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "num_return_sequences": 3, "max_new_tokens": 6}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch, **options))
    assert drawn[0].shape == (6, batch["input_ids"].shape[1] + 6)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:, :3], batch["input_ids"].repeat_interleave(3, dim=0))


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_belong_to_the_new_ids(beams):
    model, batch = tiny_model(), batch_of([[3, mel(60, 1), 5], [4, 8]])
    options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 4, "min_new_tokens": 4}
    out = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 4 and out.sequences.shape == (2 * beams, 3 + 4)
    sums = model.compute_transition_scores(
        out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits=beams == 1
    ).sum(dim=1)
    if beams > 1:
        assert (out.sequences_scores.view(2, beams).diff(dim=1) <= 0).all()
        torch.testing.assert_close(sums / 4, out.sequences_scores)
        return
    for row, item in enumerate([[3, mel(60, 1), 5], [4, 8]]):  # the same by one forward over the whole answer
        alone = batch_of([[*item, *out.sequences[row, 3:].tolist()]])
        logits = model(**alone, output_logits=True).logits[0, -5:-1]
        logits[:, 2] = -torch.inf  # the closing token, which min_new_tokens forbids
        log_p = logits.log_softmax(dim=-1)
        expected = log_p.gather(1, out.sequences[row, 3:, None]).sum()
        torch.testing.assert_close(sums[row], expected.to(sums.dtype), atol=1e-5, rtol=1e-5)


def test_a_beam_search_of_a_batch_equals_that_of_its_rows(rows):
    model = tiny_model()
    together = model.generate(**rows, num_beams=3, max_new_tokens=5, min_new_tokens=5)
    alone = model.generate(**batch_of([[3, mel(90, 1), 5]]), num_beams=3, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(together[0], alone[0])


# --- attention, types ---------------------------------------------------------------------------------------------


def padded(batch: dict) -> dict:
    """The same windows at their full length, as ``audio_padding="max_length"`` has them."""
    missing = WINDOW_MEL_FRAMES - batch["input_features"].shape[2]
    full = {name: torch.nn.functional.pad(batch[name], (0, missing)) for name in batch if "features" in name}
    return batch | full


@pytest.mark.parametrize("audio_padding", ["longest", "max_length"])
@pytest.mark.parametrize("eager", [("audio_config",), ("text_config",), ("audio_config", "text_config")], ids="+".join)
def test_kinds_of_attention_agree(folder, rows, audio_padding, eager):
    """Float64 for the encoder; an eager LLM computes its softmax in fp32, and is NaN on padding in float64."""
    dtype = torch.float32 if "text_config" in eager else torch.float64
    batch = padded(rows) if audio_padding == "max_length" else rows
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    load = SoundwaveForConditionalGeneration.from_pretrained
    attention = "eager" if len(eager) == 2 else {eager[0]: "eager"}
    sdpa = load(folder, dtype=dtype, attn_implementation="sdpa", audio_padding=audio_padding)
    other = load(folder, dtype=dtype, attn_implementation=attention, audio_padding=audio_padding)
    for name, module in (("audio_config", other.audio_tower), ("text_config", other.language_model)):
        assert module.config._attn_implementation == ("eager" if name in eager else "sdpa")
    atol = 1e-5 if dtype is torch.float32 else 1e-12
    valid = sdpa.splice(batch["input_ids"], batch["attention_mask"], batch).attention_mask.bool()
    torch.testing.assert_close(other(**batch).logits[valid], sdpa(**batch).logits[valid], rtol=0, atol=atol)
    if dtype is torch.float64:
        assert torch.equal(other.generate(**batch, max_new_tokens=6), sdpa.generate(**batch, max_new_tokens=6))


def test_eager_attention_transcribes_as_sdpa_does(trained):
    model, processor, _ = trained
    eager = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    inputs = processor(audio=spoken(8)[1], sampling_rate=16_000)
    assert torch.equal(eager.generate(**inputs, max_new_tokens=32), model.generate(**inputs, max_new_tokens=32))


@pytest.mark.slow
def test_flex_attention_agrees(folder, rows):
    """It compiles itself, and knows neither float64 nor a backward pass on a CPU."""
    batch = {name: value.float() if value.is_floating_point() else value for name, value in rows.items()}
    load = SoundwaveForConditionalGeneration.from_pretrained
    sdpa, flex = (load(folder, attn_implementation=name) for name in ("sdpa", "flex_attention"))
    valid = sdpa.splice(batch["input_ids"], batch["attention_mask"], batch).attention_mask.bool()
    with torch.no_grad():
        torch.testing.assert_close(flex(**batch).logits[valid], sdpa(**batch).logits[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", MARGINS, ids=str)
def test_half_precision_gives_the_ids_of_fp32_where_scores_differ(trained, dtype, capsys):
    model, processor, _ = trained
    half = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    flips = 0
    waveforms = spoken(24)[1]
    for start in range(0, len(waveforms), 12):
        inputs = processor(audio=waveforms[start : start + 12], sampling_rate=16_000)
        N = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True, output_scores=True)
        ids = half.generate(**inputs, max_new_tokens=32)[:, N:]
        expected = out.sequences[:, N:]
        length = min(ids.shape[1], expected.shape[1])
        for row in torch.nonzero((ids[:, :length] != expected[:, :length]).any(dim=1)).flatten().tolist():
            flips += 1
            first = int((ids[row, :length] != expected[row, :length]).int().argmax())
            best, second = out.scores[first][row].log_softmax(dim=-1).topk(2).values
            assert best - second < MARGINS[dtype]
    with capsys.disabled():
        print(f"\n{dtype}: {flips} of {len(waveforms)} transcripts differ from fp32")
    assert flips <= 2


# --- variants of the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["dropped", "kept", "all"])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_variants_survive_saving(tmp_path, rows, context, mask_padding):
    """Recordings of several windows included, whose padding counts where it is not masked."""
    model = tiny_model(shrink_context=context, mask_padding=mask_padding, audio_padding="max_length")
    model.save_pretrained(tmp_path)
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    batch = padded(rows)
    assert again.dtype == torch.float64
    assert torch.equal(again.generate(**batch, max_new_tokens=5), model.generate(**batch, max_new_tokens=5))
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    whole = WINDOW_MEL_FRAMES // 4
    heard = model.align(**audio).mask.sum(dim=1).tolist()  # three windows that begin every 30 frames, and two more
    assert heard == ([90, 30, 4] if mask_padding else [60 + whole, whole, whole])


def test_an_llm_with_tied_embeddings(tmp_path, rows):
    text = LlamaConfig.from_dict(tiny_config().text_config.to_dict() | {"tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "llm")
    torch.manual_seed(0)
    config = SoundwaveConfig.from_dict(tiny_config().to_dict() | {"text_config": text.to_dict()})
    model = SoundwaveForConditionalGeneration(config).double().eval()
    model.init_from_embeddings()
    model.save_pretrained(tmp_path / "whole")
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    llm = again.language_model
    assert llm.lm_head.weight.data_ptr() == llm.get_input_embeddings().weight.data_ptr()
    assert torch.equal(again.generate(**rows, max_new_tokens=5), model.generate(**rows, max_new_tokens=5))


def test_a_loaded_model_keeps_what_no_stage_trains_frozen(folder):
    for kind in (SoundwaveForConditionalGeneration, SoundwaveForCTC):
        frozen = {name for name, p in kind.from_pretrained(folder).named_parameters() if not p.requires_grad}
        assert any(name.startswith("audio_tower.") for name in frozen)
        assert ("ctc_head.weight" in frozen) == (kind is SoundwaveForCTC)
        assert not any(name.startswith("alignment_adapter.") for name in frozen)


@pytest.mark.parametrize("kind", [SoundwaveForConditionalGeneration, SoundwaveForCTC])
@pytest.mark.parametrize("trained_encoder", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(folder, kind, trained_encoder):
    batch = batch_of([[3, mel(60, 1), 5, 8], [4, 6, 7]], labels=True)
    batch |= {"ctc_labels": torch.tensor([[5, 6]]), "ctc_label_lengths": torch.tensor([2])}
    if kind is SoundwaveForCTC:
        batch = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}
    model = kind.from_pretrained(folder, dtype=torch.float64, alignment_dropout=0.0, shrinking_dropout=0.0).train()
    model.audio_tower.requires_grad_(trained_encoder)
    model.train()

    def gradients() -> dict:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return {"loss": loss} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert any(name.startswith("audio_tower.") for name in plain) == trained_encoder
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    towers = {name.partition(".")[0] for name in wrapped}
    assert towers == {"audio_tower"} | ({"language_model"} if kind is SoundwaveForConditionalGeneration else set())
    torch.testing.assert_close(gradients(), plain)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(gradients(), plain)


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_features_mask": torch.ones(2, 36)}, r"input_features_mask has shape \(2, 36\), expected \(1, 36\)"),
        ({"input_features_mask": torch.ones(1, 32)}, r"input_features_mask has shape \(1, 32\), expected \(1, 36\)"),
        ({"window_offsets": torch.zeros(1, 1)}, r"window_offsets has shape \(1, 1\), expected \(1,\)"),
    ],
)
def test_shapes_beside_the_features_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**(batch_of([[3, mel(9, 1)]]) | change), max_new_tokens=1)


@pytest.mark.parametrize("lengths", [[3, 5], [3], [-1, 2]])
def test_lengths_of_reused_recordings_are_checked(lengths):
    embeds, ids = torch.zeros(2, 4, 32).double(), torch.tensor([[3, 60, 60]])
    with pytest.raises(ValueError, match="expected 2 numbers of positions up to 4"):
        tiny_model().generate(ids, audio_embeds=embeds, audio_lengths=torch.tensor(lengths), max_new_tokens=1)


def test_a_blank_that_the_head_cannot_emit_is_refused():
    with pytest.raises(ValueError, match="ctc_blank_id is 4, .* one of ctc_token_ids"):
        tiny_config(ctc_blank_id=4, ctc_token_ids=[3, 5])
    with pytest.raises(ValueError, match="ctc_blank_id is 60, .* an id below 60"):
        tiny_config(ctc_blank_id=60)
    assert tiny_config(ctc_blank_id=5, ctc_token_ids=[3, 5]).blank_id == 5
