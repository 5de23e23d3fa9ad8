"""Files installed with the package: `TINY`, the folder of a small trained checkpoint (synthesized speech only)."""

from pathlib import Path

TINY = Path(__file__).resolve().parent / "tiny"

__all__ = ["TINY"]
