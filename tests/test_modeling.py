"""The whole model: sizes, losses, masks, windows, and that a row does not depend on its neighbours."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, WhisperConfig

from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration
from tests.tiny_models import AUDIO_ID, MEL_BINS, VOCABULARY, WINDOW_MEL_FRAMES, tiny_config, tiny_model

OVERLAP = WINDOW_MEL_FRAMES // 4


def windows_of(audio: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Cut log-mel (M, T) into overlapping windows, with their offsets in mel frames."""
    offsets = [0]
    while offsets[-1] + WINDOW_MEL_FRAMES < audio.shape[1]:
        offsets.append(offsets[-1] + WINDOW_MEL_FRAMES - OVERLAP)
    return [audio[:, o : o + WINDOW_MEL_FRAMES] for o in offsets], offsets


def batch_of(rows: list[list], pad_to: int = 0, pad_left: bool = True, labels: bool = False) -> dict:
    """Rows of token ids and log-mels (M, T) -> model inputs."""
    audios = [item for row in rows for item in row if isinstance(item, torch.Tensor)]
    ids = [[AUDIO_ID if isinstance(item, torch.Tensor) else item for item in row] for row in rows]
    N = max(pad_to, *map(len, ids))
    inputs = {"input_ids": torch.zeros(len(rows), N, dtype=torch.long)}
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    for i, row in enumerate(ids):
        where = slice(N - len(row), N) if pad_left else slice(0, len(row))
        inputs["input_ids"][i, where], inputs["attention_mask"][i, where] = torch.tensor(row), 1
    if labels:
        skip = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == AUDIO_ID)
        inputs["labels"] = inputs["input_ids"].masked_fill(skip, -100)
    if audios:
        windows, offsets = zip(*(windows_of(audio) for audio in audios), strict=True)
        flat = [window for group in windows for window in group]
        T = max(window.shape[1] for window in flat)
        inputs["input_features"] = torch.stack([F.pad(window, (0, T - window.shape[1])) for window in flat])
        lengths = torch.tensor([window.shape[1] for window in flat])
        inputs["input_features_mask"] = (torch.arange(T) < lengths[:, None]).long()
        inputs["window_offsets"] = torch.tensor([offset for group in offsets for offset in group])
        inputs["windows_per_audio"] = torch.tensor([len(group) for group in windows])
    return inputs


def mel(aligned_frames: int, seed: int) -> torch.Tensor:
    return torch.randn(MEL_BINS, 4 * aligned_frames, generator=torch.Generator().manual_seed(seed)).double()


@st.composite
def conversations(draw):
    """One to three rows of 1 to 5 items: tokens, and recordings of 40 ms to three windows."""
    token = st.integers(3, VOCABULARY - 1)
    audio = st.builds(mel, st.integers(1, 110), st.integers(0, 10**6))
    return draw(st.lists(st.lists(st.one_of(token, token, audio), min_size=1, max_size=5), min_size=1, max_size=3))


MODELS = {
    "paper": {},
    "released": {
        "alignment_attention": "frame",
        "shrink_context": "kept",
        "keep_blanks": True,
        "ctc_head": "separate",
    },
    "all": {"shrink_context": "all", "ctc_head": "separate"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


@given(conversations(), st.booleans(), st.integers(0, 8))
@settings(max_examples=25)
def test_a_row_does_not_depend_on_its_neighbours(model, rows, pad_left, pad_to):
    together = model(**batch_of(rows, pad_to, pad_left), output_logits=True)
    alone = [model(**batch_of([row])) for row in rows]
    counts = [int(out.audio_positions.sum()) if out.audio_positions is not None else 0 for out in alone]
    assert together.audio_positions is None or int(together.audio_positions.sum()) == sum(counts)
    spliced_left = pad_left or not bool((batch_of(rows, pad_to, False)["attention_mask"] == 0).any())
    for out, logits in zip(alone, together.logits, strict=True):
        L = out.logits.shape[1]
        mine = logits[-L:] if spliced_left else logits[:L]
        torch.testing.assert_close(mine, out.logits[0], rtol=0, atol=1e-9)


@given(conversations())
@settings(max_examples=20)
def test_generated_ids_of_a_batch_equal_those_of_each_row(model, rows):
    batch = batch_of(rows)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)
    N = batch["input_ids"].shape[1]
    assert torch.equal(together[:, :N], batch["input_ids"])
    for row, ids in zip(rows, together, strict=True):
        alone = model.generate(**batch_of([row]), max_new_tokens=4, do_sample=False)[0, len(row) :]
        answer = ids[N:][: len(alone)]
        assert torch.equal(answer, alone)
        assert (ids[N + len(alone) :] == 0).all()


@given(conversations().filter(lambda rows: any(len(row) > 1 for row in rows)), st.booleans())
@settings(max_examples=20)
def test_loss_is_the_mean_over_labelled_tokens(model, rows, pad_left):
    batch = batch_of(rows, 7, pad_left, labels=True)
    out = model(**batch, output_logits=True)
    assert model(**batch).logits is None
    torch.testing.assert_close(model(**batch).loss, out.loss)
    total, count = 0.0, 0
    for row in rows:  # label shift, token by token: the position before each labelled token predicts it
        single = model(**batch_of([row]))
        position, lengths = -1, single.audio_positions.tolist() if single.audio_positions is not None else []
        for item in row:
            if isinstance(item, torch.Tensor):
                position += lengths.pop(0)
                continue
            position += 1
            if position > 0:
                total -= single.logits[0, position - 1].log_softmax(-1)[item]
                count += 1
    if count:
        torch.testing.assert_close(out.ce_loss, total / count)
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * max(count, 1)).loss, out.loss / 2)


def test_ctc_loss_joins_with_its_weight(model):
    batch = batch_of([[3, mel(30, 1), 5], [4, mel(20, 2), 6]], labels=True)
    labels, lengths = torch.tensor([[5, 6, 6], [7, 0, 0]]), torch.tensor([3, -1])
    out = model(**batch, ctc_labels=labels, ctc_label_lengths=lengths)
    torch.testing.assert_close(out.loss, out.ce_loss + 0.3 * out.ctc_loss)
    again = model(**batch, ctc_labels=labels, ctc_label_lengths=lengths, num_ctc_tokens=30, num_items_in_batch=1)
    torch.testing.assert_close(again.ctc_loss, out.ctc_loss / 10)  # one recording of three tokens counts
    nothing = model(**batch, ctc_labels=labels, ctc_label_lengths=torch.tensor([-1, -1]))
    assert nothing.ctc_loss.item() == 0.0


def test_an_empty_transcript_is_all_blank(model):
    batch = batch_of([[3, mel(5, 1), 5]], labels=True)
    out = model(**batch, ctc_labels=torch.zeros(1, 0, dtype=torch.long), ctc_label_lengths=torch.tensor([0]))
    assert torch.isfinite(out.ctc_loss) and out.ctc_loss > 0


def test_every_recording_yields_a_position():
    model = tiny_model()
    with torch.no_grad():  # every frame the same: one run of one token
        model.alignment_adapter.norm.weight.zero_()
        model.alignment_adapter.norm.bias.fill_(1.0)
        model.ctc_head.blank.fill_(-10.0)
    assert model(**batch_of([[3, mel(40, 1)]])).audio_positions.tolist() == [1]
    with torch.no_grad():  # every frame blank, over several windows
        model.ctc_head.blank.fill_(10.0)
    silent = model(**batch_of([[3, mel(110, 1), 4, mel(1, 2)]]))
    assert silent.audio_positions.tolist() == [1, 1]
    assert torch.isfinite(silent.logits).all()


def test_all_frames_kept_leaves_nothing_to_look_at():
    model = tiny_model()
    out = model(**batch_of([[3, mel(1, 4), 5]]))  # one frame: kept, and no frame is left
    assert out.audio_positions.tolist() == [1]
    assert torch.isfinite(out.logits).all()


def test_nan_is_refused_and_named():
    model, batch = tiny_model(), batch_of([[3, mel(9, 1)]])
    batch["input_features"][0, 2, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.generate(**batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_features": torch.zeros(1, MEL_BINS + 1, 8).double()}, "expected \\(n_windows, 16, T\\)"),
        ({"input_features": torch.zeros(1, MEL_BINS, 4 * 99).double()}, "multiple of 4 up to 160"),
        ({"input_features": torch.zeros(0, MEL_BINS, 8).double()}, "hold nothing"),
        ({"input_features_mask": torch.zeros(1, 36)}, "window 0 is masked whole"),
        ({"input_features": torch.zeros(1, MEL_BINS, 0).double()}, "hold nothing"),
        ({"windows_per_audio": torch.tensor([2])}, "windows_per_audio counts 2"),
        ({"input_ids": torch.tensor([[3, 4]])}, "0 audio tokens .* but 1 recordings"),
        ({"input_ids": torch.tensor([[AUDIO_ID, AUDIO_ID]])}, "2 audio tokens .* but 1 recordings"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(change, message):
    batch = batch_of([[3, mel(9, 1)]]) | change
    if "input_features" in change:
        batch["input_features_mask"] = None
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**batch, max_new_tokens=1)


def test_nothing_that_was_given_is_ignored():
    model, batch = tiny_model(), batch_of([[3, mel(9, 1)]])
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    with pytest.raises(ValueError, match="0 audio tokens .* but 1 recordings"):
        model(input_ids=torch.tensor([[3, 4]]), **audio)
    with pytest.raises(ValueError, match="inputs_embeds or recordings, not both"):
        model(inputs_embeds=torch.zeros(1, 2, 32).double(), **audio)
    with pytest.raises(ValueError, match="ctc_labels need labels"):
        model(**batch, ctc_labels=torch.tensor([[4]]), ctc_label_lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="No prompt: give input_ids"):
        model(**audio)
    with pytest.raises(ValueError, match="every recording has a window"):
        model(**(batch | {"windows_per_audio": torch.tensor([1, 0])}))


def test_decoding_by_hand_equals_generate_for_padded_rows():
    model, batch = tiny_model(), batch_of([[3, 7, 8, 5], [4]])
    expected = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    step = ids
    for _ in range(4):
        out = model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)
        scores = out.logits[:, -1].clone()
        scores[:, 2] = -torch.inf  # the closing token, which min_new_tokens forbids
        step, cache = scores.argmax(-1, keepdim=True), out.past_key_values
        ids, mask = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
    assert torch.equal(ids, expected)


def test_hidden_states_come_through_and_losses_work_in_inference_mode(model):
    batch = batch_of([[3, mel(9, 1), 5]])
    out = model.generate(**batch, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    assert len(out.hidden_states) >= 1
    labelled = batch_of([[3, mel(9, 1), 5]], labels=True)
    ctc = {"ctc_labels": torch.tensor([[4, 5]]), "ctc_label_lengths": torch.tensor([2])}
    expected = model(**labelled, **ctc).loss
    with torch.inference_mode():
        torch.testing.assert_close(model(**labelled, **ctc).loss, expected)


def test_a_restricted_head_survives_saving(tmp_path):
    allowed = [3, 5, 8, 13, 21, 34]
    model = tiny_model(dtype=torch.float32, ctc_token_ids=allowed)
    model.save_pretrained(tmp_path)
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    batch = batch_of([[3, mel(60, 1).float()]])
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    heard = again.transcribe_ids(**audio)
    assert heard == model.transcribe_ids(**audio)
    assert set(heard[0]) <= set(allowed)


def test_text_rows_train_beside_silence_and_gradients_reach_what_is_trained():
    model = tiny_model(dtype=torch.float32).train()
    assert not model.audio_tower.training and model.alignment_adapter.training
    rows = [[3, mel(30, 1).float(), 5], [4, 6, 7]]
    out = model(**batch_of(rows, labels=True), ctc_labels=torch.tensor([[5]]), ctc_label_lengths=torch.tensor([1]))
    out.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in model.audio_tower.parameters())


def test_reused_audio_embeds_give_the_same_answer():
    model, batch = tiny_model(), batch_of([[3, mel(60, 1), 5], [mel(9, 2), 4]])
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    embeds, lengths, _ = model.get_audio_features(**audio)
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    torch.testing.assert_close(model(**text, audio_embeds=embeds, audio_lengths=lengths).logits, model(**batch).logits)


def test_cached_encoder_features_give_the_same_logits():
    model, batch = tiny_model(), batch_of([[3, mel(100, 1), 5]])
    expected = model(**batch).logits
    features = model.encode(batch.pop("input_features"), batch["input_features_mask"])
    torch.testing.assert_close(model(**batch, encoder_features=features).logits, expected)


def test_full_windows_ignore_what_the_mask_hides():
    model = tiny_model(audio_padding="max_length")
    features = torch.randn(1, MEL_BINS, WINDOW_MEL_FRAMES).double()
    mask = (torch.arange(WINDOW_MEL_FRAMES) < 40).long()[None]
    assert model.align(features, mask).mask.sum() == 10
    everything = tiny_model(audio_padding="max_length", mask_padding=False)
    assert everything.align(features, mask).mask.sum() == WINDOW_MEL_FRAMES // 4
    other = features.clone()
    other[..., 41:] += 1.0  # Whisper hears what follows the end; the frames beyond it still do not count
    assert model(torch.tensor([[3, AUDIO_ID]]), input_features=other, input_features_mask=mask).audio_positions <= 10


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"repetition_penalty": 1.3}]
)
def test_generate_takes_the_librarys_options(options):
    model, batch = tiny_model(), batch_of([[3, mel(30, 1), 5], [4]])
    ids = model.generate(**batch, max_new_tokens=3, **options)
    assert ids.shape[0] == 2 * options.get("num_return_sequences", 1)
    assert torch.equal(ids[0, :3], batch["input_ids"][0])


def test_generate_returns_the_librarys_output_object_and_counts_max_length_on_the_given_ids():
    model, batch = tiny_model(), batch_of([[3, mel(100, 1), 5]])
    out = model.generate(**batch, max_length=7, min_length=7, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape == (1, 7) and len(out.scores) == 4
    with pytest.raises(ValueError, match="max_length 2 and 3 prompt ids"):
        model.generate(**batch, max_length=2)
    with pytest.raises(NotImplementedError, match="ignore every recording"):
        model.generate_batch([[1, 2]])


def test_static_cache_and_prompt_lookup_equal_plain_greedy():
    model, batch = tiny_model(), batch_of([[3, mel(50, 1), 5, 5]])
    plain = model.generate(**batch, max_new_tokens=8, do_sample=False)
    static = model.generate(**batch, max_new_tokens=8, do_sample=False, cache_implementation="static")
    lookup = model.generate(**batch, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(plain, static) and torch.equal(plain, lookup)


def test_an_assistant_drafts_without_changing_a_token():
    model, batch = tiny_model(), batch_of([[3, mel(50, 1), 5, 5]])
    plain = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assistant = tiny_model(seed=1).language_model
    assert torch.equal(plain, model.generate(**batch, max_new_tokens=8, do_sample=False, assistant_model=assistant))


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_papers():
    """Table 1: Whisper large-v3 and Llama 3.1 8B."""
    from peft import LoraConfig, inject_adapter_in_model

    audio = WhisperConfig(
        d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = SoundwaveForConditionalGeneration(
            SoundwaveConfig(audio_config=audio, text_config=text, audio_token_id=128256)
        )
        assert count(model.audio_tower) == 636_968_960
        assert count(model.alignment_adapter) == 144_760_832
        assert count(model.shrinking_adapter) == 67_133_440
        assert count(model.ctc_head) == 4097  # a blank row and a scale: the matrix is the LLM's
        assert count(model.language_model) == 8_030_261_248
        lora = LoraConfig(r=64, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        inject_adapter_in_model(lora, model.language_model)
        trained = sum(p.numel() for name, p in model.language_model.named_parameters() if "lora_" in name)
        assert trained == 54_525_952


@pytest.mark.parametrize("field", ["max_audio_positions", "max_transcript_seconds"])
def test_bounds_are_more_than_nothing(field):
    with pytest.raises(ValueError, match=f"{field} is 0, expected more than 0"):
        tiny_config(**{field: 0})


def test_padding_that_counts_needs_full_windows():
    with pytest.raises(ValueError, match="depend on the batch"):
        tiny_config(mask_padding=False, audio_padding="longest")


@pytest.mark.parametrize("field", ["alignment_attention", "shrink_context", "ctc_head", "audio_padding"])
def test_configuration_names_a_wrong_choice(field):
    with pytest.raises(ValueError, match=f"{field} is 'loud', expected one of"):
        tiny_config(**{field: "loud"})


def test_speech_starts_as_loud_as_text():
    model = tiny_model()
    embeddings = model.get_input_embeddings().weight
    gain = embeddings.norm(dim=-1).mean() / embeddings.shape[1] ** 0.5
    torch.testing.assert_close(model.shrinking_adapter.norm.weight, gain.expand(32))
    rows = model.ctc_head.log_scale.exp() * embeddings
    torch.testing.assert_close(rows.norm(dim=-1).mean(), torch.tensor(2.0, dtype=torch.float64))
