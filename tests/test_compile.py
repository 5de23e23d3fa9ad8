"""Static cache and `torch.compile` give the ids of eager, and recordings of new lengths do not compile for ever."""

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from transformers import CompileConfig

from tests.test_modeling import batch_of, conversations, mel
from tests.tiny_models import tiny_model

AUDIO_LENGTHS = (30, 60, 75, 110, 8)  # aligned frames; 110 is three windows
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches() -> list[dict]:
    """Batches of a recording and a row of text, the recording of another length each time."""
    return [batch_of([[3, mel(frames, frames), 5], [4, 6, 7]]) for frames in AUDIO_LENGTHS]


def compiled(backend: str) -> CompileConfig:
    """The library's compiled decoding, which it uses by itself on a GPU only."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return config


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_as_eager(model, **options) -> list[int]:
    """Ids of every batch with the options equal those without; returns the graphs compiled after each."""
    seen = []
    start = graphs()
    for batch in batches():
        ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, cache_implementation="static", **options)
        seen.append(graphs() - start)
        assert torch.equal(ids, tiny_model().generate(**batch, max_new_tokens=NEW_TOKENS))
    return seen


@given(conversations())
@settings(max_examples=15)
def test_a_static_cache_gives_the_ids_of_a_growing_one(model, rows):
    batch = batch_of(rows)
    ids = model.generate(**batch, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ids, model.generate(**batch, max_new_tokens=NEW_TOKENS, cache_implementation="static"))


def test_decoding_compiles_in_one_graph_and_a_bounded_number_of_times(model):
    """The whole step is traced (fullgraph), as on a GPU; the backend that runs it as it is makes no code."""
    seen = assert_as_eager(model, compile_config=compiled("eager"))
    assert 0 < seen[0] <= 2
    assert seen[-1] == seen[1] <= 3  # once for the first lengths, once for any


@pytest.mark.slow
def test_a_compiled_llm_takes_any_length():
    model = tiny_model()
    model.language_model.forward = torch.compile(model.language_model.forward, backend="eager")
    seen = assert_as_eager(model)
    assert 0 < seen[-1] == seen[2] <= 6


@pytest.mark.slow
def test_generated_code_gives_the_ids_of_eager(model):
    assert_as_eager(model, compile_config=compiled("inductor"))


@pytest.mark.slow
def test_a_compiled_forward_gives_the_ids_and_losses_of_eager():
    """The whole forward, recordings included: what depends on the data breaks the graph and nothing else.

    Traced, not generated: torch 2.11 writes C++ that no compiler takes for the library's mask of a padded prompt.
    """
    model, eager = tiny_model(), tiny_model()
    labelled = batch_of([[3, mel(60, 1), 5, 8], [4, 6, 7]], labels=True)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(model(**labelled).loss, eager(**labelled).loss, rtol=0, atol=1e-9)
        for batch in batches()[:2]:
            torch.testing.assert_close(model(**batch).logits, eager(**batch).logits, rtol=0, atol=1e-9)
            ids = model.generate(**batch, max_new_tokens=NEW_TOKENS)
            assert torch.equal(ids, eager.generate(**batch, max_new_tokens=NEW_TOKENS))
