"""FastCDC against the specification's test vectors, and against the algorithm written down once more."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyfastcdc import FastCDC

from lathe_cas.fast_cdc import FastCdcCutter, FastCdcParameters

# A print by Toriyama Sekien, of 1781: what the specification's vectors are made from.
PICTURE = Path(__file__).parents[2] / "data/SekienAkashita.jpg"

# Spec: REAPI, fastcdc2020_test_vectors.txt: offset, length, SHA-256 and fingerprint of each chunk, by seed.
VECTORS = {
    0: """
        0 19186 0f9efa589121d5d9e9e2c4ace91337d77cae866537143f6f15a0ffd525a77c2d 17583755766661134474
        19186 19279 c7c86a165573c16448cda35c9169742e85645af42be22889f8b96b8ee0ec7cb0 4098594969649699419
        38465 17354 bc88521e28a8b4479cdea5f75aa721a24f3a0a7d0be903aa6d505c574e51e89d 2365586132076908760
        55819 16387 4b8dac2652e4685c629d2bb1ae9d4448e676b86f2e67ca0b2fff3d9580184b79 16009206469796846404
        72206 19940 c0a7062da6f2386c28e086ee0cedd5732252741269838773cff1ddb05b2df6ed 2473608525189754172
        92146 17320 7fa5b12134dc75cd2ac8dc60d3a8f3c8d22f0ee9d4cf74a4aa937e2a0d2d79a5 2504464741100432583
    """,
    666: """
        0 17635 cb3a9d80a3569772d4ed331ca37ab0c862c759897b890fc1aac90a4f2ea3a407 17021115692437263050
        17635 17334 d758c6b7b0b7eef1e996f8ccd17de6c645360b03a26c35541e7581348ac08944 8231525949846907466
        34969 19136 24846aefd89e510594bae3e9d7d5ea5012067601512610fed126a3c57ba993f5 10944310959829698982
        54105 17467 efa785e1fefb49f190e665f72fd246c1442079874508c312196da1fb3040d00b 13602876513398592944
        71572 23593 a2f557bdd8d40d8faada963ad5f91ec54b10ccee7c5ae72754a65137592dc607 2945079350535657389
        95165 14301 e131100b4a7147ccad19dc63c4a2fac1f5d8b644e1373eeb6803825024234efc 8981594897574481255
    """,
}

# Spec: FastCdc2020Params, GEAR, says "MD5(byte(i))". As in the program that came with the paper, it is 64 such bytes;
# no other table makes the vectors.
GEAR = [int.from_bytes(hashlib.md5(bytes((i,)) * 64, usedforsecurity=False).digest()[:8], "big") for i in range(256)]
# Of the C program that came with the paper, for an average of 1 KiB: those of 4 KiB and of 256 bytes, by level 2.
STRICT_MASK, EASY_MASK = 0x0000D90103530000, 0x0000001800035300
AVERAGE = 1024


def expected_sizes(data: bytes, seed: int = 0) -> list[int]:
    """Cut byte by byte, as the paper has it; bytes are taken in pairs, so an odd one at the end is not looked at."""
    sizes = []
    while data:
        sizes.append(expected_cut(data[: 4 * AVERAGE], seed))
        data = data[sizes[-1] :]
    return sizes


def expected_cut(data: bytes, seed: int) -> int:
    if len(data) <= AVERAGE // 4:
        return len(data)
    center = min(AVERAGE, len(data)) // 2 * 2
    fingerprint = 0
    for position in range(AVERAGE // 4, len(data) // 2 * 2):
        fingerprint = ((fingerprint << 1) + (GEAR[data[position]] ^ seed)) % (1 << 64)
        if not fingerprint & (STRICT_MASK if position < center else EASY_MASK):
            return position
    return len(data)


def cut(data: bytes, piece_sizes: list[int], parameters: FastCdcParameters) -> list[bytes]:
    cutter = FastCdcCutter(parameters)
    chunks: list[bytes] = []
    position = 0
    for size in [*piece_sizes, len(data)]:
        chunks += map(bytes, cutter.feed(data[position : position + size]))
        position += size
    return chunks + list(map(bytes, cutter.finish()))


@pytest.mark.parametrize("seed", VECTORS)
def test_the_package_makes_the_cut_points_of_the_specification(seed: int) -> None:
    # These parameters are no average with its quarter and fourfold, which is all that our own class can say.
    algorithm = FastCDC(16_384, min_size=4_096, max_size=65_535, normalized_chunking=2, seed=seed)
    data = PICTURE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == "d9e749d9367fc908876749d6502eb212fee88c9a94892fb07da5ef3ba8bc39ed"

    found = [
        f"{chunk.offset} {chunk.length} {hashlib.sha256(chunk.data).hexdigest()} {chunk.gear_hash}"
        for chunk in algorithm.cut_buf(data)
    ]

    assert found == [line.strip() for line in VECTORS[seed].strip().splitlines()]


def test_the_picture_is_cut_at_the_same_places_by_our_class() -> None:
    # No chunk of the vectors comes near 65,535 bytes, so the largest size of 65,536 changes none of them.
    chunks = cut(PICTURE.read_bytes(), [1_000, 70_000, 1], FastCdcParameters(16_384))

    assert [len(chunk) for chunk in chunks] == [int(line.split()[1]) for line in VECTORS[0].strip().splitlines()]


def test_the_package_is_the_compiled_one() -> None:
    # It falls back to Python by itself, which is two hundred times slower.
    assert FastCDC.__module__.startswith("pyfastcdc.cy.")


@given(
    seed=st.sampled_from([0, 1, 0xFFFF_FFFF]),
    size=st.integers(0, 20_000),
    content=st.one_of(st.integers(0, 1_000), st.sampled_from([b"\0", b"abc"])),
    piece_sizes=st.lists(st.integers(0, 9_000), max_size=8),
)
def test_pieces_of_any_size_are_cut_as_the_algorithm_says(
    seed: int, size: int, content: int | bytes, piece_sizes: list[int]
) -> None:
    data = random.Random(content).randbytes(size) if isinstance(content, int) else (content * size)[:size]

    chunks = cut(data, piece_sizes, FastCdcParameters(AVERAGE, seed))

    assert b"".join(chunks) == data
    assert [len(chunk) for chunk in chunks] == expected_sizes(data, seed)


def test_no_more_is_held_than_the_largest_chunk_and_a_piece() -> None:
    parameters = FastCdcParameters(AVERAGE)
    cutter = FastCdcCutter(parameters)

    for _ in range(200):
        cutter.feed(bytes(1_000))
        assert cutter._held_bytes < parameters.max_bytes
