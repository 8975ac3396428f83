"""Offsets of the files in a large zip file. With InstructPix2Pix's 2.6 million files, `zipfile` needs 2 GB."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

# PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end)
LOCAL_HEADER = struct.Struct("<4s4xH16xHH")
ENTRY = struct.Struct("<4s16xLLHHH8xL")
END = struct.Struct("<4s8xLLH")
END_64 = struct.Struct("<4s36xQQ")
LOCATOR_64 = struct.Struct("<4s4xQ4x")
LARGEST_FILE = 2**26  # maximum size of a file in bytes
LONGEST_COMMENT = 65535
IN_EXTRA_FIELD = 0xFFFFFFFF  # stands for a value that does not fit in 32 bits


Place = tuple[int, int]  # where the header of a file starts, and its compressed size in bytes


def list_files(path: Path) -> Iterator[tuple[bytes, Place]]:
    """The name and position of each file in a zip file. Raises `zipfile.BadZipFile` if it is damaged."""
    try:
        directory = read_central_directory(path)
        start, end, unpack = 0, len(directory), ENTRY.unpack_from
        while start < end:
            mark, size, full_size, name_length, extra_length, comment_length, offset = unpack(directory, start)
            if mark != b"PK\x01\x02":
                raise zipfile.BadZipFile("its list of files is damaged")
            name_end = start + ENTRY.size + name_length
            if size == IN_EXTRA_FIELD or full_size == IN_EXTRA_FIELD or offset == IN_EXTRA_FIELD:
                extra = directory[name_end : name_end + extra_length]
                _, size, offset = sizes_of_64_bits(extra, full_size, size, offset)
            yield directory[start + ENTRY.size : name_end], (offset, size)
            start = name_end + extra_length + comment_length
    except struct.error as error:
        raise zipfile.BadZipFile("its list of files is cut off") from error


def read_central_directory(path: Path) -> bytes:
    """The entries of all files, which are at the end of a zip file."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        tail_start = max(0, length - LONGEST_COMMENT - END.size - LOCATOR_64.size)
        file.seek(tail_start)
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0:
            raise zipfile.BadZipFile("it has no list of files; is the download complete?")
        _, size, start, _ = END.unpack_from(tail, end)
        locator = tail[max(0, end - LOCATOR_64.size) : end]
        if locator.startswith(b"PK\x06\x07"):
            file.seek(LOCATOR_64.unpack(locator)[1])
            _, size, start = END_64.unpack(file.read(END_64.size))
        if start + size > length:
            raise zipfile.BadZipFile("its list of files is cut off")
        file.seek(start)
        return file.read(size)


def sizes_of_64_bits(extra: bytes, *values: int) -> list[int]:
    """The values of an entry; 64-bit values are read from its extra field."""
    while (header := struct.unpack_from("<HH", extra))[0] != 1:
        extra = extra[4 + header[1] :]
    found = list(values)
    large = [place for place, value in enumerate(values) if value == IN_EXTRA_FIELD]
    for place, value in zip(large, struct.unpack_from(f"<{len(large)}Q", extra, 4), strict=True):
        found[place] = value
    return found


def read_file(path: Path, place: Place) -> bytes:
    """The content of a file in a zip file. Raises `zipfile.BadZipFile` if it is damaged or too large."""
    offset, size = place
    try:
        with path.open("rb") as file:
            file.seek(offset)
            _, method, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            data = file.read(min(size, LARGEST_FILE + 1))
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, LARGEST_FILE + 1)
    except (struct.error, zlib.error) as error:
        raise zipfile.BadZipFile(f"a damaged file ({error})") from error
    if len(data) > LARGEST_FILE:
        raise zipfile.BadZipFile(f"a file of more than {LARGEST_FILE} bytes")
    return data
