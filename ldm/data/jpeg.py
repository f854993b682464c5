"""JPEG files (ITU-T T.81) without what describes the file rather than the picture, their picture untouched."""

from collections.abc import Iterator

from ldm.data.images import JPEG

NEEDED = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}  # of application segments: how the colours are coded
APPLICATION, COMMENT, SCAN, END = range(0xE0, 0xF0), 0xFE, 0xDA, 0xD9
ALONE = {0x00, 0x01, 0xFF, *range(0xD0, 0xD8)}  # within coded data: a stuffed byte, padding, restart markers


def bare(blob: bytes) -> bytes:
    """A decodable JPEG without EXIF, XMP, IPTC, colour profile, comments, thumbnails, and what follows its end."""
    return b"".join([JPEG, *(blob[start:end] for marker, start, end in _segments(blob) if _is_picture(blob, marker, start))])


def _is_picture(blob: bytes, marker: int, start: int) -> bool:
    if marker in NEEDED:  # not its namesakes: JFXX holds a thumbnail
        return blob[start + 4 :].startswith(NEEDED[marker])
    return marker not in APPLICATION and marker != COMMENT


def _segments(blob: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment after the first two bytes; that of a scan ends with its coded data."""
    position, marker = len(JPEG), 0
    while marker != END and (position := blob.find(b"\xff", position)) >= 0:  # as decoders do, over bytes between segments
        while blob[position + 1 : position + 2] == b"\xff":  # padding before a marker
            position += 1
        start, marker = position, blob[position + 1] if position + 1 < len(blob) else END
        position += 2 if marker == END or marker in ALONE else 2 + int.from_bytes(blob[position + 2 : position + 4])
        if marker == SCAN:
            position = blob.find(b"\xff", position)
            while position >= 0 and position + 1 < len(blob) and blob[position + 1] in ALONE:
                position = blob.find(b"\xff", position + 1)
            position = position if position >= 0 else len(blob)
        if marker not in ALONE:
            yield marker, start, position
