"""Colour names that instructions use, as 8-bit RGB (Geng et al., CVPR 2024, section 3.1)."""

MASK_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "purple": (128, 0, 128),
    "blue": (0, 0, 255),
    "green": (0, 128, 0),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
