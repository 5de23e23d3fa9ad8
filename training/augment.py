"""SpecAugment (Park et al. 2019) on log-mel windows, by torchaudio, a function of its seed alone."""

from dataclasses import dataclass

import torch

REFERENCE_BINS = 80  # the mel bins that the policy's widths were chosen for


@dataclass(frozen=True)
class SpecAugment:
    """Masks of random bands and spans with the mean of what is there.

    Args:
        freq_masks: bands per window.
        freq_mask_width: widest band, in mel bins of 80; scaled to the actual number of bins.
        time_masks: spans per window.
        time_mask_width: longest span, in mel frames of 10 ms.
        time_mask_share: longest span as a share of the window's valid frames, for short recordings.
    """

    freq_masks: int = 2
    freq_mask_width: int = 27
    time_masks: int = 2
    time_mask_width: int = 100
    time_mask_share: float = 0.2

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, mask: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Masked copy of log-mel windows (n_windows, M, T); padding, where `mask` (n_windows, T) is 0, stays.

        The masks depend on the seed and the lengths only: not on the global random state, which is left as it was.
        """
        # Imported here: torchaudio must fit torch exactly, and only a run that augments needs it.
        from torchaudio.functional import mask_along_axis

        out = features.clone()
        lengths = [features.shape[2]] * len(features) if mask is None else mask.sum(dim=1).tolist()
        band = max(1, self.freq_mask_width * features.shape[1] // REFERENCE_BINS)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
            for window, length in zip(out, lengths, strict=True):
                length = int(length)
                if length == 0:
                    continue
                valid = window[None, None, :, :length]
                mean = float(valid.mean())
                for _ in range(self.freq_masks):
                    valid = mask_along_axis(valid, min(band, features.shape[1]), mean, axis=2)
                span = min(self.time_mask_width, int(self.time_mask_share * length))
                for _ in range(self.time_masks if span > 0 else 0):
                    valid = mask_along_axis(valid, span, mean, axis=3)
                window[:, :length] = valid[0, 0]
        return out
