"""Signs in a container that a file ends before its recording does. Decoders stop there without a word."""

import struct
from typing import IO

from .mp3_soundwave import mp3_is_cut

STREAMED = 0x7FFF0000  # bytes; WAV writers into a pipe announce this or more, or nothing
MAX_CHUNKS = 1000  # of a WAV file before its samples
OGG_PAGE = 27 + 255 + 255 * 255  # bytes at most
OGG_END = 0x04  # flag of the last page of a stream


def truncation(file: IO[bytes], kind: str) -> str:
    """What shows that a file is cut off, as a phrase; empty where nothing does.

    Args:
        file: Seekable; its position is lost.
        kind: Container, as libsndfile names it.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if kind in ("WAV", "WAVEX", "RF64"):
        announced = wav_data(file)[1]
        size -= file.tell()
        announced = 0 if announced >= STREAMED and kind != "RF64" else announced
    elif kind == "OGG":
        return _ogg_truncation(file, size)
    elif kind == "MP3":
        return "breaks off within an MP3 frame" if mp3_is_cut(file) else ""
    else:
        announced = _announced(file.read(24), kind)
    return f"announces {announced} bytes of which {size} are there" if announced > size else ""


def _announced(head: bytes, kind: str) -> int:
    """Bytes of the file according to the header of some other containers."""
    if len(head) == 24 and kind == "AIFF":
        return 8 + struct.unpack(">I", head[4:8])[0]
    if len(head) == 24 and kind == "W64":
        return struct.unpack("<Q", head[16:24])[0]
    if len(head) == 24 and kind == "AU" and head[8:12] != b"\xff\xff\xff\xff":
        return sum(struct.unpack(">II" if head[:1] == b"." else "<II", head[4:12]))
    return 0


def wav_data(file: IO[bytes]) -> tuple[int, int]:
    """Size of the whole RIFF chunk and of the samples in bytes as announced, the file then at the first sample.

    The second is 0 where no samples are announced.
    """
    magic, whole = struct.unpack("4sI", file.read(12).ljust(12, b"\0")[:8])
    order = ">" if magic == b"RIFX" else "<"
    whole = struct.unpack(order + "I", struct.pack("I", whole))[0]
    long_size = 0
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            break
        name, size = struct.unpack(order + "4sI", head)
        if name == b"data":
            return whole, long_size if long_size and size == 0xFFFFFFFF else size
        body = file.read(16) if name == b"ds64" else b""
        if len(body) == 16:
            long_size = struct.unpack("<Q", body[8:])[0]
        file.seek(size + size % 2 - len(body), 1)
    return whole, 0


def _ogg_truncation(file: IO[bytes], size: int) -> str:
    serial = file.read(18)[14:]
    file.seek(max(0, size - 2 * OGG_PAGE))
    tail = file.read()
    start = tail.rfind(b"OggS")
    page = tail[start:] if start >= 0 else b""
    length = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
    if page and (len(page) < length or not page[5] & OGG_END):
        return "lacks the page that ends an OGG stream"
    if page and page[14:18] != serial:
        return "holds several OGG streams, of which only the first is decoded"
    return ""
