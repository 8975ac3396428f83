"""Download the training material of `instructdiffusion-tiny`: photographs, emoji and CLIP's byte-pair merges.

It is in Debian, npm and PyPI packages, which are downloaded with their own clients. Licenses: CC0, public domain,
CC-BY or CC-BY-SA for photographs, MIT, OFL or CC-BY for emoji, MIT for the merges. CREDITS.md lists every file.
"""

import io
import json
import re
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw, ImageFont

from instructdiffusion_pipeline.files import atomic_write, write_text

PHOTO_PACKAGES = ["gcompris-qt-data", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"]
# style -> npm package, path of a code point's image in it, author and license
NPM_STYLES = {
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets/{}.webp", "Microsoft Fluent emoji, MIT"),
    "flat": ("@lobehub/fluent-emoji-flat@1.1.0", "assets/{}.svg", "Microsoft Fluent emoji, MIT"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64/{}.png", "Twitter Twemoji, CC-BY 4.0"),
}
NOTO_PACKAGE, NOTO_FONT = "fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NOTO_SIZE = 109  # pixels, the only size of the font's images
MERGES_PACKAGE = "open_clip_torch==3.2.0"
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
FREE_LICENSES = re.compile(r"CC0|public.domain|CC-BY(?!-N)", re.IGNORECASE)
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".webp", ".png"}
# Folders of gcompris-qt-data with photographs. Its other images are drawings and paintings.
GCOMPRIS_PHOTOS = re.compile(
    r"clickgame/.*sea|erase/|explore_(farm_animals|monuments|world_animals|world_music)/"
    r"|categorization/resource/images/(renewable|monuments|fishes)/"
)
MIN_SIDE = 300
STORED_SIDE = 300
OBJECT_SIDE = 128

# Names of objects -> the short name in emoji-datasource, if it is different. `plural` has the plural of all names.
NAMES = dict(
    entry.strip().partition(": ")[::2]
    for entry in """
accordion, airplane, alarm clock, anchor, ant, apple, avocado, axe, backpack: school_satchel, balloon, banana,
baseball, basket, basketball, bat, bathtub, bear, bed, bee, beer mug: beer, bell, bicycle: bike, bird, broom,
bucket, bus, butterfly, cactus, camel, camera, candle, canoe, car, carrot, cat, chair, chicken,
chili pepper: hot_pepper, coconut, coffee cup: coffee, cookie, corncob: corn, crab, crocodile, croissant, crown,
cucumber, cupcake, dog, dolphin, donut: doughnut, dragon, drum: drum_with_drumsticks, duck, eagle, eggplant,
elephant, fire engine, fish, flamingo, flashlight, football: soccer, fox: fox_face, fried egg, frog, gift,
giraffe: giraffe_face, gorilla, guitar, hamburger, hammer, hedgehog, helicopter, hippo: hippopotamus,
horse: racehorse, hot dog: hotdog, hourglass, house, ice cream: icecream, jellyfish, kangaroo, key, kite,
kiwi: kiwifruit, koala, ladybug, lemon, light bulb: bulb, lion: lion_face, lizard, lobster, magnet, maple leaf,
microscope, monkey, mushroom, octopus, onion, orange: tangerine, owl, padlock: lock, palm tree, panda: panda_face,
parrot, peacock, pear, penguin, pig, pineapple, pizza, potted plant, pretzel, pumpkin: jack_o_lantern,
rabbit: rabbit2, raccoon, rhino: rhinoceros, ring, rocket, rooster, rose, sailboat: boat, saxophone, scorpion,
seashell: shell, shark, skateboard, snail, snake, spider, star, strawberry, sunflower, swan, teapot, teddy bear,
telescope, television: tv, tent, tiger: tiger2, top hat: tophat, tractor, tree: deciduous_tree, trophy, truck,
trumpet, tulip, turtle, ufo: flying_saucer, umbrella: umbrella_with_rain_drops, unicorn: unicorn_face, violin,
volcano, watermelon, whale: whale2, wrench, yarn ball: yarn, zebra: zebra_face
""".replace("\n", " ").split(",")
)


def fetch(folder: Path) -> None:
    """Write photographs/*.jpg, objects/STYLE/*.png, bpe_simple_vocab_16e6.txt.gz and CREDITS.md to `folder`.

    Nothing is done if CREDITS.md exists, which is written last.
    """
    if (folder / "CREDITS.md").exists():
        return
    packages, photographs, objects = (folder / name for name in ("packages", "photographs", "objects"))
    for path in (packages, photographs, objects):
        path.mkdir(parents=True, exist_ok=True)

    credits = ["# Credits", "", "## Photographs", ""]
    for package in PHOTO_PACKAGES:
        root = unpack_debian(packages, package)
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
            name = re.sub(r"[^a-z0-9]+", "_", str(path.with_suffix("")).lower()) + ".jpg"
            picture.save(photographs / name, quality=85)
            credits.append(f"- {name}: {holder}, {license} (Debian package {package})")

    codes = read_codes(open_npm(packages, "emoji-datasource@16.0.0").extractfile("package/emoji.json").read())
    credits += ["", "## Objects", "", *(f"- {name} (U+{code.upper()})" for name, code in codes.items()), ""]
    for style, (package, path, author) in NPM_STYLES.items():
        archive = open_npm(packages, package)
        drawings = {
            name: open_drawing(archive.extractfile(f"package/{path.format(code)}").read())
            for name, code in codes.items()
        }
        save_drawings(drawings, objects / style)
        credits.append(f"Drawn in style {style}: {author}, from the npm package {package}.")
    font = ImageFont.truetype(unpack_debian(packages, NOTO_PACKAGE) / NOTO_FONT, NOTO_SIZE)
    save_drawings({name: draw_character(code, font) for name, code in codes.items()}, objects / "noto")
    credits.append(f"Drawn in style noto: Google Noto emoji, OFL 1.1, from the Debian package {NOTO_PACKAGE}.")

    subprocess.run(["pip", "download", "--quiet", "--no-deps", MERGES_PACKAGE], cwd=packages, check=True)
    with zipfile.ZipFile(next(packages.glob("open_clip_torch-*.whl"))) as wheel:
        merges = wheel.read(f"open_clip/{MERGES_FILE}")
    (folder / MERGES_FILE).write_bytes(merges)
    credits += ["", "## Words", "", f"CLIP's byte-pair merges, MIT, from the PyPI package {MERGES_PACKAGE}.", ""]
    write_text(folder / "CREDITS.md", "\n".join(credits))


def unpack_debian(packages: Path, package: str) -> Path:
    """Download a Debian package and return the folder of its files."""
    root = packages / package
    if not root.exists():
        subprocess.run(["apt-get", "download", package], cwd=packages, check=True)
        with atomic_write(root) as partial:
            subprocess.run(["dpkg-deb", "-x", next(packages.glob(f"{package}_*.deb")), partial], check=True)
    return root


def open_npm(packages: Path, package: str) -> tarfile.TarFile:
    """Download an npm package and open it."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=packages, check=True, stdout=subprocess.PIPE, text=True
    )
    return tarfile.open(packages / packed.stdout.strip())


def read_codes(emoji_json: bytes) -> dict[str, str]:
    """Return the code points of `NAMES`, from emoji.json of emoji-datasource."""
    codes = {
        short_name: emoji["unified"].lower() for emoji in json.loads(emoji_json) for short_name in emoji["short_names"]
    }
    return {name: codes[short_name or name.replace(" ", "_")] for name, short_name in NAMES.items()}


def open_drawing(content: bytes) -> Image.Image:
    """Open an image file as RGBA; an SVG is drawn with `OBJECT_SIDE` pixels."""
    if content.lstrip().startswith(b"<svg"):
        import resvg_py  # imported here, because training from downloaded material does not need it

        content = bytes(resvg_py.svg_to_bytes(content.decode(), width=OBJECT_SIDE, height=OBJECT_SIDE))
    return Image.open(io.BytesIO(content)).convert("RGBA")


def draw_character(code: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw the emoji of a code point in the colors of its font."""
    character = chr(int(code.partition("-")[0], 16))
    left, top, right, bottom = font.getbbox(character)
    picture = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), character, font=font, embedded_color=True)
    return picture


def save_drawings(drawings: Mapping[str, Image.Image], folder: Path) -> None:
    """Write drawings as NAME.png, without their transparent rim and with at most `OBJECT_SIDE` pixels."""
    folder.mkdir(exist_ok=True)
    for name, picture in drawings.items():
        drawing = picture.crop(picture.getchannel("A").getbbox())
        drawing.thumbnail((OBJECT_SIDE, OBJECT_SIDE))
        drawing.save(folder / f"{name}.png")


def read_package(root: Path) -> tuple[dict[PurePosixPath, bytes], dict[PurePosixPath, tuple[str, str]]]:
    """Return the photographs of an unpacked Debian package, and (license, copyright holder) of its files, by path."""
    files, licenses = {}, {}
    for path in sorted(root.rglob("*.jpg")):
        # In the copyright files, the wallpapers are called "16.04/NAME.jpg", although they are installed elsewhere.
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
    """Return (license, copyright holder) by file from paragraphs of `Copyright:`, `License:` and `Files:`."""
    licenses = {}
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(Copyright|License|Files):\s*((?:(?!^\w+:).*\n?)*)", stanza, re.MULTILINE))
        if len(fields) == 3:
            license, holder = (" ".join(fields[key].split()) for key in ("License", "Copyright"))
            licenses |= {folder / name: (license, holder) for name in fields["Files"].split()}
    return licenses
