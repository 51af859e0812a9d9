"""The text of a file: refused when it is none, decoded by an encoding that is named or found."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from overnight.errors import Complaint, UserError

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    # before UTF-16, whose mark this one begins with
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_SIGNATURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"(\xb5/\xfd": "a zstd archive",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "a SQLite database",
    b"PAR1": "a Parquet file",
}


def read_bytes(path: Path, place: str) -> bytes:
    """The bytes of a text file.

    Raises:
        UserError: when it cannot be opened, is empty, or is no text (a picture, an archive, NUL bytes).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, place, error) from None
    _refuse_binary([raw], path, place)
    return raw


def check_text(path: Path, encoding: str, place: str) -> str:
    """The codec of a text file of any size, found as `read_bytes` and `decode` do, in memory that stays flat.

    Raises:
        UserError: as those two.
    """
    try:
        with open(path, "rb") as file:
            _refuse_binary(_blocks(file), path, place)
            return _codec(file, encoding, path, place)
    except OSError as error:
        raise _unreadable(path, place, error) from None


def read_lines(path: Path, codec: str, newline: str) -> Iterator[str]:
    """The lines of a text file, one after the other, by a codec that `check_text` found; `newline` as for `open`."""
    if codec.startswith("sloppy-"):
        import ftfy.bad_codecs  # noqa: F401  (registers it)
    with open(path, encoding=codec, newline=newline) as file:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix("\ufeff")


def name_of(codec: str) -> str:
    """What people call a codec."""
    return codec.removeprefix("sloppy-")


def _unreadable(path: Path, place: str, error: OSError) -> UserError:
    return UserError(Complaint(place, f"cannot be read ({error.strerror})", repr(str(path))))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    return iter(partial(file.read, 2**20), b"")


def _refuse_binary(blocks: Iterable[bytes], path: Path, place: str) -> None:
    head, blank = b"", True
    for block in blocks:
        head = head or block[:16]
        for signature, kind in _SIGNATURES.items():
            if head.startswith(signature):
                raise UserError(Complaint(place, f"must be a text file, this is {kind}", repr(str(path))))
        if _mark(head) not in ("utf-16", "utf-32") and b"\0" in block:
            raise UserError(Complaint(place, "must be a text file, this one holds binary data", repr(str(path))))
        blank = blank and not block.strip()
    if blank:
        raise UserError(Complaint(place, "the file is empty", repr(str(path))))


def _mark(raw: bytes) -> str | None:
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)


def decode(raw: bytes, encoding: str, path: Path, place: str) -> tuple[str, str]:
    """The text and the name of the encoding that was used.

    `auto` takes what a byte-order mark says, then UTF-8 where it fits strictly. Legacy bytes are told apart by
    charset-normalizer only as far as that is reliable: an encoding of another script (Cyrillic, Greek, Chinese, …) is
    taken when the result reads like a language. Between the many Latin ones its answer changes with the size of the
    sample, so they are all read as windows-1252, which is what browsers do, and which every byte string fits.

    Raises:
        UserError: when the encoding named in the config is unknown or does not fit.
    """
    codec = _codec(io.BytesIO(raw), encoding, path, place)
    return raw.decode(codec).removeprefix("\ufeff"), name_of(codec)


def _codec(file: BinaryIO, encoding: str, path: Path, place: str) -> str:
    if encoding != "auto":
        try:
            wrong = _first_wrong(file, encoding)
        except LookupError:
            raise UserError(Complaint(place, "no such encoding", repr(encoding))) from None
        if wrong is not None:
            rule = f"{path.name} is not {encoding} at byte {wrong:,}; try encoding: auto"
            raise UserError(Complaint(place, rule))
        return encoding
    file.seek(0)
    codec = _mark(file.read(16)) or "utf-8"
    if _first_wrong(file, codec) is None:
        return codec
    other = _other_script(file)
    if other and _first_wrong(file, other) is None:
        return other
    import ftfy.bad_codecs  # noqa: F401  (registers it: the five bytes that windows-1252 leaves open map to C1)

    return "sloppy-windows-1252"


def _first_wrong(file: BinaryIO, encoding: str) -> int | None:
    """The first byte that an encoding does not fit; None when it fits all."""
    decoder = codecs.getincrementaldecoder(encoding)()
    place = 0
    for block in chain(_blocks(file), [b""]):
        begun = place - len(decoder.getstate()[0])
        try:
            decoder.decode(block, final=not block)
        except UnicodeError as error:
            return begun + getattr(error, "start", 0)
        place += len(block)
    return None


def _other_script(file: BinaryIO) -> str | None:
    """The detected encoding, when most letters outside ASCII are then of another script than Latin."""
    import unicodedata

    from charset_normalizer import from_bytes

    # only the lines that tell encodings apart, and not all of a large file
    file.seek(0)
    telling = b""
    for line in file:
        if not line.isascii():
            telling += line
        if len(telling) > 65_536:
            break
    best = from_bytes(telling[:65_536]).best()
    if best is None or best.coherence == 0:
        return None
    letters = [c for c in str(best) if not c.isascii() and c.isalpha()]
    foreign = sum(not unicodedata.name(c, "").startswith("LATIN") for c in letters)
    return str(best.encoding) if foreign > len(letters) / 2 else None
