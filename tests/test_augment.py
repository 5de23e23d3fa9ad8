"""SpecAugment: masks inside the valid part, the same for the same seed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from soundwave.training.augment import SpecAugment


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 2**40))
def test_padding_and_lengths_are_respected(lengths, seed):
    features = torch.randn(len(lengths), 20, 60)
    mask = torch.arange(60) < torch.tensor(lengths)[:, None]
    augment = SpecAugment(freq_masks=1, freq_mask_width=20, time_masks=1, time_mask_width=8)
    out = augment(features, mask, seed)
    assert torch.equal(out, augment(features, mask, seed))
    changed = out != features
    assert not changed[~mask[:, None].expand_as(changed)].any()
    for k, length in enumerate(lengths):
        inside = changed[k, :, :length]
        if length == 0:
            continue
        whole_bands, whole_spans = inside.all(dim=1), inside.all(dim=0)
        assert whole_bands.sum() <= 20 * 20 // 80
        if not whole_bands.all():
            assert whole_spans.sum() <= min(8, 0.2 * length)
        # What changed is whole bands and whole spans, and nothing else.
        assert torch.equal(inside, whole_bands[:, None] | whole_spans[None])


def test_masks_depend_on_the_seed_and_leave_the_global_state_alone():
    features = torch.randn(2, 80, 300)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = SpecAugment()(features, None, seed=1), SpecAugment()(features, None, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, two)
    assert not torch.equal(one, features)
    # The masked value is the mean of what was there at that point: close to the window's.
    assert torch.allclose(one[one != features], torch.tensor(0.0), atol=0.1)


def test_the_accelerators_are_not_seeded(monkeypatch):
    seeded = []
    for device in (torch.cuda, torch.xpu, torch.mps):
        name = "manual_seed" if device is torch.mps else "manual_seed_all"
        monkeypatch.setattr(device, name, seeded.append)
    torch.manual_seed(1)
    assert seeded  # what the library's own function does to them
    seeded.clear()
    SpecAugment()(torch.randn(1, 16, 100), None, seed=9)
    assert not seeded


def test_one_window_is_masked_the_same_in_any_batch():
    features = torch.randn(3, 16, 100)
    alone = SpecAugment()(features[:1], None, seed=9)
    assert torch.equal(alone[0], SpecAugment()(features, None, seed=9)[0])
