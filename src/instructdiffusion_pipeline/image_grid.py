"""Captioned pictures on sheets, and files that appear whole or not at all."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

PANEL, MARGIN, FONT_SIZE = 256, 12, 15  # pixels


def strip(title: str, panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Captioned pictures side by side under a title, each fitted into a square."""
    font, line = ImageFont.load_default(FONT_SIZE), FONT_SIZE + 5
    captions = [textwrap.fill(caption, 2 * PANEL // FONT_SIZE) for caption, _ in panels]
    header = MARGIN + line * (1 + max(caption.count("\n") + 1 for caption in captions))
    sheet = Image.new("RGB", (MARGIN + len(panels) * (PANEL + MARGIN), header + PANEL + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN // 2), title, "black", font)
    for index, (caption, (_, picture)) in enumerate(zip(captions, panels, strict=True)):
        left = MARGIN + index * (PANEL + MARGIN)
        pen.multiline_text((left, MARGIN // 2 + line), caption, "#444444", font)
        sheet.paste(ImageOps.contain(picture.convert("RGB"), (PANEL, PANEL)), (left, header + MARGIN // 2))
    return sheet


def stack(strips: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, flush left, on white."""
    sheet = Image.new("RGB", (max(part.width for part in strips), sum(part.height for part in strips)), "white")
    top = 0
    for part in strips:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet
