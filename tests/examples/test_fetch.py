import json
import struct
import zlib
from pathlib import PurePosixPath

import pytest
from fetch import FREE_LICENSES, NAMES, OBJECT_SIDE, open_drawing, read_codes, read_licenses, read_rcc


def resource(files):
    """A Qt resource (version 3) with `files` in a folder "pictures". Files whose names end in z are compressed."""
    names, data, offsets = b"", b"", {}
    for name in ["pictures", *files]:
        offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
    tree += struct.pack(">IHIIQ", offsets["pictures"], 2, len(files), 2, 0)
    for name, content in files.items():
        compressed = name.endswith("z")
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
        tree += struct.pack(">IHIIQ", offsets[name], int(compressed), 0, len(data), 0)
        data += struct.pack(">I", len(stored)) + stored
    header = 24
    places = (header, header + len(tree), header + len(tree) + len(data))
    return struct.pack(">4s5I", b"qres", 3, *places, 0) + tree + data + names


def test_qt_resources_are_unpacked_unchanged():
    files = {"a.webp": b"stored", "b.z": b"squeezed " * 9, "äöü.txt": b""}
    found = dict(read_rcc(resource(files)))
    assert found == {PurePosixPath("pictures", name): content for name, content in files.items()}


def test_other_files_raise_an_error():
    with pytest.raises(ValueError, match="starts with b'qres'"):
        list(read_rcc(b"PK\3\4" + bytes(40)))


def test_licenses_of_paragraphs():
    text = (
        "Copyright: Ann\nLicense: CC-BY-SA 4.0\nSource: https://example.org\nFiles:\na.webp\nsub/b.webp\n\n"
        "Files: c.jpg\n d.jpg\nCopyright: 2018, Bob\n 2019, Cy\nLicense: GPL-3+\n"
    )
    found = read_licenses(text, PurePosixPath("top"))
    assert found == {
        PurePosixPath("top/a.webp"): ("CC-BY-SA 4.0", "Ann"),
        PurePosixPath("top/sub/b.webp"): ("CC-BY-SA 4.0", "Ann"),
        PurePosixPath("top/c.jpg"): ("GPL-3+", "2018, Bob 2019, Cy"),
        PurePosixPath("top/d.jpg"): ("GPL-3+", "2018, Bob 2019, Cy"),
    }


@pytest.mark.parametrize("name", ["CC0-1.0", "Public Domain", "public-domain", "CC-BY 2.0", "CC-BY-SA-4.0"])
def test_free_licenses(name):
    assert FREE_LICENSES.match(name)


@pytest.mark.parametrize("name", ["GPL-3+", "CC-BY-NC-4.0", "CC-BY-ND 2.0", "unknown", "free-art"])
def test_other_licenses(name):
    assert not FREE_LICENSES.match(name)


def test_names_have_the_code_points_of_their_short_names():
    short = [short_name or name.replace(" ", "_") for name, short_name in NAMES.items()]
    emoji = [{"unified": f"1F{index:03X}-FE0F", "short_names": ["other", name]} for index, name in enumerate(short)]
    codes = read_codes(json.dumps(emoji).encode())
    assert codes == {name: f"1f{index:03x}-fe0f" for index, name in enumerate(NAMES)}
    assert NAMES["football"] == "soccer" and NAMES["alarm clock"] == "" and len(NAMES) == 157


def test_an_svg_is_drawn_with_transparency():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M0 0h16v32H0z" fill="#f00"/></svg>'
    drawing = open_drawing(svg)
    assert drawing.size == (OBJECT_SIDE, OBJECT_SIDE)
    assert drawing.getpixel((30, 64)) == (255, 0, 0, 255) and drawing.getpixel((100, 64))[3] == 0
