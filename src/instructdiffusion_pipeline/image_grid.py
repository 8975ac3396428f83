"""Grids of labeled images."""

import textwrap
from collections.abc import Sequence

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps

PANEL, MARGIN, FONT_SIZE = 256, 12, 15  # pixels


def labeled_grid(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> Image.Image:
    """A grid with a row of images for each `(title, [(label, image), ...])`. Each image is fitted into a square."""
    font, line = ImageFont.load_default(FONT_SIZE), FONT_SIZE + 5
    labels = [[textwrap.fill(label, 2 * PANEL // FONT_SIZE) for label, _ in panels] for _, panels in rows]
    label_lines = max(label.count("\n") + 1 for row in labels for label in row)
    header = MARGIN + line * (1 + label_lines)
    columns = max(len(panels) for _, panels in rows)
    blank = Image.new("RGB", (PANEL + MARGIN, header + PANEL + 2 * MARGIN), "white")
    cells = []
    for row, (_, panels) in zip(labels, rows, strict=True):
        for label, (_, picture) in zip(row, panels, strict=True):
            cell = blank.copy()
            ImageDraw.Draw(cell).multiline_text((MARGIN, MARGIN // 2 + line), label, "#444444", font)
            cell.paste(ImageOps.contain(picture.convert("RGB"), (PANEL, PANEL)), (MARGIN, header + MARGIN // 2))
            cells.append(cell)
        cells += [blank] * (columns - len(panels))
    grid = make_image_grid(cells, rows=len(rows), cols=columns)
    pen = ImageDraw.Draw(grid)
    for index, (title, _) in enumerate(rows):
        pen.text((MARGIN, index * blank.height + MARGIN // 2), title, "black", font)
    return grid
