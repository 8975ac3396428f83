"""Download the training material of the small model: photographs, emoji and the byte-pair merges of CLIP.

It is taken from Debian, npm and PyPI packages with their own clients. Licences: CC0, public domain, CC-BY or CC-BY-SA
for photographs, MIT, Apache-2.0 or CC-BY for emoji, MIT for the merges. CREDITS.md lists every file.
"""

import io
import re
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from instructdiffusion_pipeline.files import atomic_write, write_text

DEBIAN_PACKAGES = ["gcompris-qt-data", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"]
# style -> npm package, path of the picture of a code point in it, author and licence
OBJECT_STYLES = {
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets/{}.webp", "Microsoft Fluent emoji, MIT"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64/{}.png", "Google Noto emoji, Apache-2.0"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64/{}.png", "Twitter Twemoji, CC-BY 4.0"),
}
MERGES_PACKAGE = "open_clip_torch==3.2.0"
FREE_LICENSES = re.compile(r"CC0|public.domain|CC-BY(?!-N)", re.IGNORECASE)
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".webp", ".png"}
# Folders of gcompris-qt-data with photographs. Its other pictures are drawings and paintings.
GCOMPRIS_PHOTOS = re.compile(
    r"clickgame/.*sea|erase/|explore_(farm_animals|monuments|world_animals|world_music)/"
    r"|categorization/resource/images/(renewable|monuments|fishes)/"
)
MIN_SIDE = 300
STORED_SIDE = 192

# name -> code point of the emoji. They are few and look different, because the model is small.
OBJECTS = {
    "airplane": "2708-fe0f",
    "apple": "1f34e",
    "banana": "1f34c",
    "bell": "1f514",
    "butterfly": "1f98b",
    "car": "1f697",
    "carrot": "1f955",
    "cat": "1f431",
    "dog": "1f436",
    "donut": "1f369",
    "elephant": "1f418",
    "football": "26bd",
    "frog": "1f438",
    "guitar": "1f3b8",
    "ladybug": "1f41e",
    "lemon": "1f34b",
    "mushroom": "1f344",
    "owl": "1f989",
    "panda": "1f43c",
    "penguin": "1f427",
    "pig": "1f437",
    "pizza": "1f355",
    "rocket": "1f680",
    "rose": "1f339",
    "snail": "1f40c",
    "strawberry": "1f353",
    "sunflower": "1f33b",
    "tree": "1f333",
    "turtle": "1f422",
    "umbrella": "2614",
    "violin": "1f3bb",
}


def fetch(folder: Path) -> None:
    """Write photographs/*.png, objects/STYLE/*.png, bpe_simple_vocab_16e6.txt.gz and CREDITS.md to `folder`.

    If CREDITS.md, the last file to be written, exists, nothing is done.
    """
    if (folder / "CREDITS.md").exists():
        return
    packages, photographs, objects = (folder / name for name in ("packages", "photographs", "objects"))
    for path in (packages, photographs, objects):
        path.mkdir(parents=True, exist_ok=True)

    credits = ["# Credits", "", "## Photographs", ""]
    for package in DEBIAN_PACKAGES:
        root = packages / package
        if not root.exists():
            subprocess.run(["apt-get", "download", package], cwd=packages, check=True)
            with atomic_write(root) as partial:
                subprocess.run(["dpkg-deb", "-x", next(packages.glob(f"{package}_*.deb")), partial], check=True)
        files, licenses = read_package(root)
        for path, content in files.items():
            license, holder = licenses.get(path, ("unknown", "unknown"))
            if not FREE_LICENSES.match(license):
                continue
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            if min(picture.size) < MIN_SIDE:
                continue
            scale = STORED_SIDE / min(picture.size)
            picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
            name = re.sub(r"[^a-z0-9]+", "_", str(path.with_suffix("")).lower()) + ".png"
            picture.save(photographs / name)
            credits.append(f"- {name}: {holder}, {license} (Debian package {package})")

    credits += ["", "## Objects", "", *(f"- {name} (U+{code.upper()})" for name, code in OBJECTS.items()), ""]
    for style, (package, path, author) in OBJECT_STYLES.items():
        (objects / style).mkdir(exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=packages, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(packages / packed.stdout.strip()) as archive:
            for name, code in OBJECTS.items():
                member = archive.extractfile(f"package/{path.format(code)}")
                picture = Image.open(io.BytesIO(member.read())).convert("RGBA")
                picture.crop(picture.getchannel("A").getbbox()).save(objects / style / f"{name}.png")
        credits.append(f"Drawn in style {style}: {author}, from the npm package {package}.")

    subprocess.run(["pip", "download", "--quiet", "--no-deps", MERGES_PACKAGE], cwd=packages, check=True)
    with zipfile.ZipFile(next(packages.glob("open_clip_torch-*.whl"))) as wheel:
        merges = wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(merges)
    credits += ["", "## Words", "", f"CLIP's byte-pair merges, MIT, from the PyPI package {MERGES_PACKAGE}.", ""]
    write_text(folder / "CREDITS.md", "\n".join(credits))


def read_package(root: Path) -> tuple[dict[PurePosixPath, bytes], dict[PurePosixPath, tuple[str, str]]]:
    """Return the photographs of an unpacked Debian package, and (licence, copyright holder) of its files, by path."""
    files, licenses = {}, {}
    for path in sorted(root.rglob("*.jpg")):
        # The copyright files of the wallpapers call them "16.04/NAME.jpg", although they are installed elsewhere.
        files[PurePosixPath(root.name.rpartition("-")[2], path.name)] = path.read_bytes()
    for path in root.rglob("copyright"):
        licenses |= read_licenses(path.read_text(), PurePosixPath())
    for path in sorted(root.rglob("*.rcc")):
        for inner, content in read_rcc(path.read_bytes()):
            if inner.name == "README":
                licenses |= read_licenses(content.decode(), inner.parent)
            elif inner.suffix in PHOTO_SUFFIXES and GCOMPRIS_PHOTOS.search(str(inner)):
                files[inner] = content
    return files, licenses


def read_rcc(blob: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the files of a Qt binary resource: format version 3, stored or compressed with zlib."""
    magic, _, tree, data, names = struct.unpack_from(">4s4I", blob)
    if magic != b"qres":
        raise ValueError(f"`blob` must be a Qt resource, which starts with b'qres'; got {magic!r}.")
    is_compressed, is_folder, node_size = 1, 2, 22

    def walk(index: int, parent: PurePosixPath) -> Iterator[tuple[PurePosixPath, bytes]]:
        name_offset, flags, first, second = struct.unpack_from(">IHII", blob, tree + index * node_size)
        (length,) = struct.unpack_from(">H", blob, names + name_offset)
        start = names + name_offset + 6
        path = parent / blob[start : start + 2 * length].decode("utf-16-be") if index else parent
        if flags & is_folder:
            count, child = first, second
            for i in range(child, child + count):
                yield from walk(i, path)
        else:
            (offset,) = struct.unpack_from(">I", blob, tree + index * node_size + 10)
            (size,) = struct.unpack_from(">I", blob, data + offset)
            content = blob[data + offset + 4 : data + offset + 4 + size]
            yield path, zlib.decompress(content[4:]) if flags & is_compressed else content

    yield from walk(0, PurePosixPath())


def read_licenses(text: str, folder: PurePosixPath) -> dict[PurePosixPath, tuple[str, str]]:
    """Return (licence, copyright holder) by file from paragraphs of `Copyright:`, `License:` and `Files:`."""
    licenses = {}
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(Copyright|License|Files):\s*((?:(?!^\w+:).*\n?)*)", stanza, re.MULTILINE))
        if len(fields) == 3:
            license, holder = (" ".join(fields[key].split()) for key in ("License", "Copyright"))
            licenses |= {folder / name: (license, holder) for name in fields["Files"].split()}
    return licenses
