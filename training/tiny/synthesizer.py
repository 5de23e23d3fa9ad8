"""Spoken sentences from the espeak-ng library, embedded by ctypes, with the time of every phoneme and word.

espeak-ng is GPL software in a package of its own (`espeakng-loader`, the optional extra `tiny`): nothing here imports
it before a sentence is spoken.
"""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np

SYNTHESIZER_RATE = 22_050  # Hz, espeak's own
BASES = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
VARIANTS = tuple(
    # 45 male and neutral ones ...
    "Alex Andy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Reed Storm adam antonio "
    "benjamin boris caleb david ed edward gustave ian iven iven2 john klatt klatt2 klatt3 m1 m2 m3 m5 m6 m8 "
    "marcelo max miguel norbert pablo paul robert "
    # ... and 15 female ones
    "Alicia Andrea Annie anika aunty belinda f1 f2 f4 grandma linda shelby steph steph2 victor".split()
)
SEEN_VOICES = tuple(f"{base}+{variant}" for base in BASES for variant in VARIANTS)
UNSEEN_VOICES = ("en-us+m4", "en-us+f3", "en+michel", "en-gb-x-rp+steph3")
ACCENT_VOICES = ("en-gb-scotland+m4", "en-gb-scotland+f3")  # a base that no training voice has
DEV_UNSEEN_VOICES = ("en-us+m7", "en-us+f5", "en+travis", "en-gb-x-rp+quincy")  # settings are chosen on these ...
DEV_ACCENT_VOICES = ("en-029+m7", "en-029+f5")  # ... so that the test voices and accent choose nothing

_SYNCHRONOUS, _PHONEME_EVENTS_IPA = 2, 1 | 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8 = 1
_WORD_EVENT, _PHONEME_EVENT = 1, 7
_STRESS = str.maketrans("", "", "ˈˌː")


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


@dataclass(frozen=True)
class Utterance:
    """Samples (n,) float32 at 22,050 Hz, and where phonemes and words start, in seconds."""

    samples: np.ndarray
    phonemes: list[tuple[float, str]]
    words: list[tuple[float, str]]


class Synthesizer:
    """One espeak-ng library; a process can hold only one, so use `synthesizer()`.

    Raises:
        ImportError: if the package `espeakng-loader` is not installed.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                'the tiny preset speaks with espeak-ng, which is not installed: pip install "soundwave[tiny]"'
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, _PHONEME_EVENTS_IPA)
        if rate != SYNTHESIZER_RATE:
            raise RuntimeError(f"espeak-ng started with {rate} Hz, expected {SYNTHESIZER_RATE}; reinstall it")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # its own start is the time of day
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, int, float, str]] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = callback(self._receive)  # kept: ctypes would free it
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice = ""

    def _receive(self, samples: "ctypes._Pointer", count: int, events: "ctypes._Pointer") -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type:
            event = events[index]
            if event.type in (_WORD_EVENT, _PHONEME_EVENT):
                name = event.id.decode() if event.type == _PHONEME_EVENT else ""
                self._events.append((event.type, event.text_position, event.audio_ms / 1000, name))
            index += 1
        return 0

    def speak(self, text: str, voice: str, rate: int = 190, pitch: int = 50, pitch_range: int = 50) -> Utterance:
        """Return one spoken text.

        Args:
            text: words separated by single spaces.
            voice: base and variant, as `en-us+f2`.
            rate: words per minute.
            pitch: 0 to 100.
            pitch_range: 0 to 100.

        Raises:
            ValueError: if espeak-ng has no such voice.
        """
        if voice != self._voice:
            if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise ValueError(f"espeak-ng has no voice {voice!r}; give a base and a variant, as 'en-us+f2'")
            self._voice = voice
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        self._events.clear()
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768
        phonemes = [(t, name.translate(_STRESS)) for kind, _, t, name in self._events if kind == _PHONEME_EVENT]
        words = word_times(text, [(p, t) for kind, p, t, _ in self._events if kind == _WORD_EVENT], phonemes)
        return Utterance(samples, phonemes, words)


def word_times(
    text: str, starts: list[tuple[int, float]], phonemes: list[tuple[float, str]]
) -> list[tuple[float, str]]:
    """Return (start, word) of every word. espeak joins some words (`in the`) under the event of the first one.

    Args:
        text: words separated by single spaces.
        starts: (position in the text, counted from 1; seconds) of the words that have an event.
        phonemes: (seconds, IPA) in order.
    """
    known = dict(starts)
    names = text.split(" ")
    positions = [1 + sum(len(name) + 1 for name in names[:index]) for index in range(len(names))]
    times = [known.get(position) for position in positions]
    end = phonemes[-1][0] if phonemes else 0.0
    filled: list[float] = []
    for index, (start, name) in enumerate(zip(times, names, strict=True)):
        if start is None:
            before = filled[-1] if filled else 0.0
            after = next((time for time in times[index + 1 :] if time is not None), end)
            th = [time for time, phoneme in phonemes if before < time < after and phoneme.startswith("ð")]
            start = th[-1] if name == "the" and th else (before + after) / 2
        filled.append(start)
    return list(zip(filled, names, strict=True))


@functools.cache
def synthesizer() -> Synthesizer:
    """Return this process's synthesizer."""
    return Synthesizer()
