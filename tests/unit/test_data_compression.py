"""CRC-32 and gzip with ISA-L and without it: the same sums, the same content, the same damage found."""

from __future__ import annotations

import gzip
import io
import random
import sys
import zlib

import pytest

from megatron_ledom.data import compression

CONTENT = "".join(f"Line {i} of a text, naïve and 東京.\n" for i in range(2000)).encode()


def read(packed: bytes, *, by_isal: bool) -> bytes | None:
    """What a file holds, or None where it is damaged; any other error is the test's."""
    with pytest.MonkeyPatch.context() as patch:
        if not by_isal:
            for name in ("isal", "isal.igzip"):
                patch.setitem(sys.modules, name, None)
        compression._library.cache_clear()
        stream, parts = compression.open_gzip(io.BytesIO(packed)), []
        assert (type(stream) is gzip.GzipFile) != by_isal
        try:
            while part := stream.read(1 << 14):
                parts.append(part)
        except compression.reading_errors():
            return None
        finally:
            compression._library.cache_clear()
    return b"".join(parts)


def test_sums_are_zlibs() -> None:
    rng = random.Random(0)
    for _ in range(300):
        data = memoryview(rng.randbytes(rng.choice((0, 1, 7, 16, 255, 4096, 70_001))))
        assert compression.crc32(data) == zlib.crc32(data)
    assert compression._library() is not zlib


def test_both_read_the_same_and_find_the_same_damage() -> None:
    rng, packed = random.Random(1), gzip.compress(CONTENT)
    whole = [packed, packed + packed, packed + bytes(64), gzip.compress(CONTENT, 0), gzip.compress(b"")]
    damaged = [packed[:cut] for cut in (1, 5, 11, len(packed) // 2, len(packed) - 9, len(packed) - 1)]
    damaged += [packed + b"junk", packed + packed[:40], b"no gzip at all"]
    for _ in range(400):
        place = rng.randrange(len(packed))
        damaged.append(packed[:place] + bytes([packed[place] ^ 1 << rng.randrange(8)]) + packed[place + 1 :])
    num_found = 0
    for case in [*whole, *damaged]:
        found = read(case, by_isal=True)
        assert found == read(case, by_isal=False)
        assert found is None or found == CONTENT[: len(found)] or found == CONTENT * 2
        num_found += found is None
    assert [read(case, by_isal=True) for case in whole] == [CONTENT, CONTENT * 2, CONTENT, CONTENT, b""]
    assert num_found >= len(damaged) - 5  # a bit of the header that says nothing
