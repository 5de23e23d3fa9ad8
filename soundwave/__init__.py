"""Soundwave: a speech LLM that aligns speech with text, shrinks it, and then learns to follow instructions.

The sub-packages (``soundwave.modeling_soundwave``, ``soundwave.processing``, ``soundwave.training``, ...) are folders
beside this one; ``setup.py`` maps them to these names.

The names below are loaded when they are first used: ``import soundwave`` imports neither torch nor transformers. Using
one of them registers all of them with the Auto classes of transformers. A published checkpoint needs no import at all:
``AutoModel.from_pretrained(repository, trust_remote_code=True)``.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a source checkout the folders lie beside this one, and with the repository as working directory this file shadows
# an installed one: the path entry makes `soundwave.training` importable there too.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "modeling_soundwave").is_dir():
    __path__.append(str(_checkout))

_EXPORTS = {
    "SoundwaveConfig": "soundwave.modeling_soundwave",
    "SoundwaveForConditionalGeneration": "soundwave.modeling_soundwave",
    "SoundwaveForCTC": "soundwave.modeling_soundwave",
    "SoundwaveModel": "soundwave.modeling_soundwave",
    "SoundwaveProcessor": "soundwave.processing",
}
__all__ = [
    "SoundwaveConfig",
    "SoundwaveForCTC",
    "SoundwaveForConditionalGeneration",
    "SoundwaveModel",
    "SoundwaveProcessor",
    "__version__",
]

if TYPE_CHECKING:
    from soundwave.modeling_soundwave import (
        SoundwaveConfig,
        SoundwaveForConditionalGeneration,
        SoundwaveForCTC,
        SoundwaveModel,
    )
    from soundwave.processing import SoundwaveProcessor


def __getattr__(name: str) -> Any:
    """Return an exported class, importing its sub-package on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'soundwave' has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
    # Both are imported whichever was asked for: a registered model with an unregistered processor would make
    # `from_pretrained` prompt for permission to run the checkpoint's own code.
    for module in dict.fromkeys(_EXPORTS.values()):
        import_module(module)
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
