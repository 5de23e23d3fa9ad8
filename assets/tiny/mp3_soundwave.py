"""The length of an MP3 from its frames, where its first one does not say it or knows of less.

libsndfile then guesses from the bit rate of the first frame, and stops there: a file of variable bit rate, or one made
of two, would lose its end without a word.
"""

import struct
from collections.abc import Iterator
from typing import IO

MAX_LOST = 2**16  # bytes between frames that are looked through in all
TOLERANCE = 1.01  # encoders do not agree on whether the first frame counts, and some are off by more
NO_CRC = 0x01  # in the second byte of a frame
HAS_FRAMES = 0x01  # flag of a Xing header
# kbit/s; rows: MPEG 1 layers I to III, MPEG 2 and 2.5 layer I, layers II and III
BIT_RATES = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1; halved for 2, halved again for 2.5


def mp3_is_cut(file: IO[bytes]) -> bool:
    """Whether an MP3 that does not say how long it is breaks off within its last frame."""
    start, end, _, _ = _walk(file)
    return not _announced(file, start) and end > file.seek(0, 2)


def xing_frame(file: IO[bytes]) -> tuple[bytes, int]:
    """A frame to put before the first one, which tells the number of frames, and the position of the first one.

    The frame is empty where it is not needed or the frames cannot be counted.
    """
    start, end, head, count = _walk(file)
    countable = count and _layer(head) == 3 and file.seek(0, 2) - end < MAX_LOST
    if not countable or _announced(file, start) * TOLERANCE + 1 >= count:
        return b"", start
    # 128 or 80 kbit/s without padding: long enough for what is in it.
    first = bytes([head[0], head[1] | NO_CRC, 0x90 | head[2] & 0x0C, head[3]])
    mono, newest = head[3] >> 6 == 3, _version(head) == 3
    side = (17 if mono else 32) if newest else (9 if mono else 17)
    content = first + bytes(side) + b"Xing" + struct.pack(">II", HAS_FRAMES, count)
    return content.ljust(_frame_bytes(first), b"\0"), start


def _announced(file: IO[bytes], start: int) -> int:
    """Number of frames according to the first frame, at `start`; 0: it does not say."""
    file.seek(start)
    first = file.read(64)
    for mark, distance in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        field = first.find(mark) + distance
        if field >= distance and (mark == b"VBRI" or first[field - 1] & HAS_FRAMES):
            return int.from_bytes(first[field : field + 4], "big")
    return 0


def _walk(file: IO[bytes]) -> tuple[int, int, bytes, int]:
    """Where the frames begin and end, the header of the first one, and how many they are."""
    start = end = count = 0
    first = b""
    for position, head, length in _frames(file):
        if not count:
            start, first = position, head
        end, count = position + length, count + 1
    return start, end, first, count


def _frames(file: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """Position, header and length in bytes of every frame; the last one may be cut."""
    file.seek(0)
    tag = file.read(10)
    position = 0
    if len(tag) == 10 and tag.startswith(b"ID3"):
        position = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    first, lost = b"", 0
    while lost < MAX_LOST:
        head, length = _frame_at(file, position)
        if len(head) < 4:
            return
        # All frames have the version, layer and rate of the first one, which must have a second one behind it.
        if length and not first:
            second, ahead = _frame_at(file, position + length)
            length = length if ahead and _kind(second) == _kind(head) else 0
        if length and _kind(head) == _kind(first or head):
            yield position, head, length
            first, position = first or head, position + length
        else:
            position, lost = position + 1, lost + 1


def _frame_at(file: IO[bytes], position: int) -> tuple[bytes, int]:
    """The header at a position, and the length of its frame in bytes."""
    file.seek(position)
    head = file.read(4)
    return head, _frame_bytes(head)


def _kind(head: bytes) -> tuple[int, int]:
    return head[1] & 0xFE, head[2] & 0x0C


def _version(head: bytes) -> int:
    return (head[1] >> 3) & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5


def _layer(head: bytes) -> int:
    return 4 - ((head[1] >> 1) & 3)


def _frame_bytes(head: bytes) -> int:
    """Length of the frame with this header in bytes; 0: it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer = _version(head), _layer(head)
    bit_rate, rate = head[2] >> 4, (head[2] >> 2) & 3
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return 0
    row = layer - 1 if version == 3 else 3 + (layer > 1)
    bits = BIT_RATES[row][bit_rate - 1] * 1000
    hertz = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    padding = (head[2] >> 1) & 1
    if layer == 1:
        return (12 * bits // hertz + padding) * 4
    return (72 if layer == 3 and version != 3 else 144) * bits // hertz + padding
