"""Frames: whatever was sent arrives, in whatever pieces; whatever is no frame is refused, and no length is believed."""

from __future__ import annotations

import bisect
import itertools
import struct
import tracemalloc
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpworker.errors import ProtocolError
from mpworker.pool.frames import HEADER_SIZE, MAX_BODY, Frame, FrameReader, Kind, Outbox, encode, header

NUMBER = st.floats(allow_nan=False)
FRAME = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
    NUMBER,
    NUMBER,
    st.binary(max_size=50),
    st.binary(max_size=300),
)


def read(data: bytes) -> list[Frame]:
    return FrameReader("a peer").feed(data)


@given(st.lists(FRAME, max_size=8), st.lists(st.integers(1, 200), max_size=30))
def test_frames_arrive_in_whatever_pieces(frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode(*frame) for frame in frames)
    reader, arrived = FrameReader("a peer"), []
    for cut in [*cuts, len(data)]:
        arrived += reader.feed(data[:cut])
        data = data[cut:]
    assert arrived == frames
    assert reader.missing == HEADER_SIZE


@given(FRAME, st.data())
def test_a_truncated_frame_is_waited_for(frame: Frame, data: st.DataObject) -> None:
    whole = encode(*frame)
    cut = data.draw(st.integers(0, len(whole) - 1))
    reader = FrameReader("a peer")
    assert reader.feed(whole[:cut]) == []
    assert reader.missing == (HEADER_SIZE if cut < HEADER_SIZE else len(whole)) - cut
    assert reader.feed(whole[cut:]) == [frame]


@given(FRAME, st.data())
def test_one_wrong_bit_in_the_header_is_noticed(frame: Frame, data: st.DataObject) -> None:
    whole = bytearray(encode(*frame))
    bit = data.draw(st.integers(0, HEADER_SIZE * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError, match=r"^a peer sent bytes that are no frame$"):
        read(bytes(whole))


@given(st.binary(min_size=HEADER_SIZE, max_size=300))
def test_noise_is_no_frame(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(noise)


@given(FRAME, st.binary(min_size=HEADER_SIZE, max_size=100))
def test_noise_behind_a_frame_is_noticed(frame: Frame, noise: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(encode(*frame) + noise)
    assert caught.value.before == [frame]


@pytest.mark.parametrize("extra", [0, 2**32 - 1])
@pytest.mark.parametrize("body", [0, 1 << 30, MAX_BODY])
def test_a_length_is_not_believed_before_the_bytes_are_there(extra: int, body: int) -> None:
    reader = FrameReader("a peer")
    tracemalloc.start()
    try:
        reader.feed(header(Kind.DONE, 1, 0, 0.0, 0.0, extra, body))
        for _ in range(10):
            reader.feed(bytes(1000)) if extra or body else None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_an_absurd_length_is_corruption_although_its_checksum_fits() -> None:
    with pytest.raises(ProtocolError):
        read(header(Kind.DONE, 1, 0, 0.0, 0.0, 0, MAX_BODY + 1))


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(Kind)))
def test_an_unknown_kind_is_refused_although_its_checksum_fits(kind: int) -> None:
    head = bytearray(header(Kind.DONE, 1, 0, 0.0, 0.0, 0, 0)[:-4])
    head[2] = kind
    with pytest.raises(ProtocolError):
        read(bytes(head) + struct.pack("<I", crc32(head)))


@given(st.lists(st.tuples(FRAME, st.booleans()), max_size=12), st.lists(st.integers(0, 120), max_size=40))
def test_an_outbox_sends_everything_once_however_little_fits(frames: list[tuple[Frame, bool]], room: list[int]) -> None:
    box, sent, expected = Outbox(), bytearray(), b""

    def send(piece: bytes | memoryview) -> int:
        fits = room.pop() if room else 1 << 20
        if not fits:
            raise BlockingIOError
        sent.extend(piece[:fits])
        return min(fits, len(piece))

    for frame, flush in frames:
        box.put_frame(frame)
        expected += encode(*frame)
        if flush:
            assert box.flush(send, send) == (not box)
    assert box.size == len(expected) - len(sent)
    while not box.flush(send, send):
        pass
    assert (bytes(sent), box.size, bool(box)) == (expected, 0, False)


def test_a_large_body_leaves_in_one_piece_with_its_header_before_it() -> None:
    box, pieces = Outbox(), []
    frame = Frame(Kind.DONE, 7, body=bytes(1 << 20))
    box.put_frame(frame)
    assert box.flush(lambda piece: pieces.append(bytes(piece)) or len(piece), pytest.fail)
    assert read(b"".join(pieces)) == [frame]


@given(st.lists(FRAME, min_size=1, max_size=5), st.data())
def test_damage_anywhere_costs_no_frame_before_it_and_is_never_forgotten(
    frames: list[Frame], data: st.DataObject
) -> None:
    """A wrong bit in a header is noticed; one in a payload, which has a checksum of its own, changes only that."""
    whole = bytearray(b"".join(encode(*frame) for frame in frames))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    ends = list(itertools.accumulate(len(encode(*frame)) for frame in frames))
    damaged = bisect.bisect_right(ends, bit // 8)
    cut = data.draw(st.integers(0, len(whole)))
    reader, arrived, refused = FrameReader("a peer"), [], False
    for piece in (whole[:cut], whole[cut:]):
        try:
            arrived += reader.feed(bytes(piece))
        except ProtocolError as exc:
            refused = True
            arrived += exc.before
            break
    assert arrived[:damaged] == frames[:damaged]
    if refused:
        assert len(arrived) == damaged
        for more in (b"", encode(Kind.BYE)):
            with pytest.raises(ProtocolError, match=r"^a peer sent bytes that are no frame$"):
                reader.feed(more)
    else:
        assert [frame[:5] for frame in arrived] == [frame[:5] for frame in frames]


@given(
    st.sampled_from(Kind),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=5000),
    st.integers(1, 700),
)
def test_lengths_that_lie_under_a_checksum_that_fits_reserve_nothing(
    kind: Kind, extra: int, body: int, rest: bytes, piece: int
) -> None:
    stream = header(kind, 1, 0, 0.0, 0.0, extra, body) + rest
    reader = FrameReader("a peer")
    tracemalloc.start()
    try:
        for start in range(0, len(stream), piece):
            for frame in reader.feed(stream[start : start + piece]):
                assert len(frame.extra) + len(frame.body) <= len(rest)
    except ProtocolError:
        assert body > MAX_BODY or len(rest) > HEADER_SIZE
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
