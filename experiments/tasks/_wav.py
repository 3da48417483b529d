"""Reads and writes WAV files (RIFF, uncompressed PCM), as samples at one rate.

Shape legend: N samples, C channels.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

RATE = 16_000
"""Samples a second, of everything that is read or written."""

_RATES = 100, 768_000
"""Samples a second that a file may say: a damaged header would ask for any amount of memory."""

_PCM, _EXTENSIBLE = 1, 0xFFFE
_UNKNOWN_SIZE = 0x7FFFF000
"""A program that writes to a pipe (``espeak-ng --stdout``, ffmpeg) cannot know the sizes that its
headers have to say; it says this or more."""

_FORMATS = {2: "ADPCM", 3: "floating point", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x55: "MP3"}


class WavError(ValueError):
    """A file that is not what it should be; the message names file and fault."""


def read_wav(path: Path) -> np.ndarray:
    """Read a WAV file of 8 or 16 bit, any number of channels and any rate.

    Returns:
        float32 ``[N]`` in [-1, 1], the mean of the channels, resampled to ``RATE``.

    Raises:
        WavError: it cannot be read, is no WAV file, is compressed, holds no samples, or its sizes
            are not what its headers say.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WavError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_wav(content, str(path))


def parse_wav(content: bytes, name: str) -> np.ndarray:
    """Return the samples of a WAV file's content, as `read_wav` does; errors call it ``name``."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        got = f"{content[:4]!r} ... {content[8:12]!r}" if content else "an empty file"
        raise WavError(f"{name}: not a WAV file; expected RIFF ... WAVE, got {got}")
    whole = 8 + int.from_bytes(content[4:8], "little")
    is_streamed = whole > _UNKNOWN_SIZE
    if not is_streamed and whole > len(content):
        raise WavError(
            f"{name}: truncated; its header says {whole} bytes, the file has {len(content)}"
        )
    end = len(content) if is_streamed else whole
    layout, at = None, 12
    while at + 8 <= end:
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8
        if kind == b"data" and is_streamed:
            size = end - at
        if at + size > end:
            raise WavError(
                f"{name}: wrong size of chunk {kind!r}: {size} bytes, where {end - at} are left"
            )
        if kind == b"fmt ":
            layout = _layout(content[at : at + size], name)
        elif kind == b"data":
            if layout is None:
                raise WavError(f"{name}: expected chunk b'fmt ' before b'data', got none")
            return _samples(content[at : at + size], *layout, name)
        at += size + size % 2
    raise WavError(f"{name}: expected a chunk b'data', got none")


def _layout(chunk: bytes, name: str) -> tuple[int, int, int]:
    """Return channels, rate and bits."""
    if len(chunk) < 16:
        raise WavError(f"{name}: expected at least 16 bytes in chunk b'fmt ', got {len(chunk)}")
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", chunk[:16])
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        kind = int.from_bytes(chunk[24:26], "little")
    if kind != _PCM:
        raise WavError(
            f"{name}: expected uncompressed PCM (format 1), got format {kind}"
            f"{f' ({_FORMATS[kind]})' if kind in _FORMATS else ''}"
        )
    if bits not in (8, 16):
        raise WavError(f"{name}: expected 8 or 16 bits a sample, got {bits}")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise WavError(
            f"{name}: expected from {_RATES[0]} to {_RATES[1]} frames a second, got {rate}"
        )
    if channels == 0 or block != channels * bits // 8:
        raise WavError(
            f"{name}: headers that contradict each other: {channels} channel(s) of {bits} bits, "
            f"{block} bytes a frame, {rate} frames a second"
        )
    return channels, rate, bits


def _samples(chunk: bytes, channels: int, rate: int, bits: int, name: str) -> np.ndarray:
    frame = channels * bits // 8
    if not chunk:
        raise WavError(f"{name}: holds no samples")
    if len(chunk) % frame:
        raise WavError(
            f"{name}: truncated; expected frames of {frame} bytes, got {len(chunk)} bytes"
        )
    if bits == 8:
        samples_NC = (np.frombuffer(chunk, np.uint8).astype(np.float32) - 128) / 128
    else:
        samples_NC = np.frombuffer(chunk, "<i2").astype(np.float32) / 32768
    return _resampled(samples_NC.reshape(-1, channels).mean(1), rate)


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return samples ``[N]`` of another rate at ``RATE``, float32."""
    if rate == RATE:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, RATE)
    return resample_poly(samples, RATE // common, rate // common).astype(np.float32)


def wav_bytes(samples: np.ndarray) -> bytes:
    """Return a WAV file of one channel of 16 bit, of samples in [-1, 1]."""
    data = (samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes()
    layout = struct.pack("<HHIIHH", _PCM, 1, RATE, 2 * RATE, 2, 16)
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
