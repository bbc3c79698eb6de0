"""Sound as the wire has it: signed 16-bit little-endian mono samples, 16 000 a second, in base64."""

import array
import base64
import binascii
import math
import sys
from collections.abc import Iterator

_SAMPLES_PER_SECOND = 16_000
_BYTES_PER_SECOND = 2 * _SAMPLES_PER_SECOND
# About -36 dB of full scale: above the hiss of a laptop microphone, below quiet speech.
_SILENCE_PEAK = 500


def tone(seconds: float, *, chunk_seconds: float = 0.25) -> Iterator[str]:
    """Synthesise a soft tone that swells and fades, in base64 chunks of `chunk_seconds`."""
    count = int(seconds * _SAMPLES_PER_SECOND)
    samples = array.array(
        "h",
        (
            int(2_600 * math.sin(math.pi * n / count) * math.sin(math.tau * 330 * n / _SAMPLES_PER_SECOND))
            for n in range(count)
        ),
    )
    pcm = _little_endian(samples).tobytes()
    step = 2 * int(chunk_seconds * _SAMPLES_PER_SECOND)
    for start in range(0, len(pcm), step):
        yield base64.b64encode(pcm[start : start + step]).decode()


def decoded(chunk: str) -> bytes:
    """Decode a chunk of microphone audio to whole samples; what is not base64 is heard as nothing."""
    try:
        pcm = base64.b64decode(chunk, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return pcm[: len(pcm) // 2 * 2]


def seconds_of(pcm: bytes) -> float:
    """Tell how long the samples last."""
    return len(pcm) / _BYTES_PER_SECOND


def is_silent(pcm: bytes) -> bool:
    """Tell whether no sample is louder than a microphone's own noise."""
    samples = _little_endian(array.array("h", pcm))
    return not samples or (max(samples) < _SILENCE_PEAK and min(samples) > -_SILENCE_PEAK)


def _little_endian(samples: "array.array[int]") -> "array.array[int]":
    if sys.byteorder == "big":
        samples.byteswap()
    return samples
