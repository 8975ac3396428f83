"""The outlines of objects in COCO's JSON files: polygons, or run lengths, which may be compressed.

RefClef's file has a list of run lengths for each object.
"""

from typing import Any

from instructdiffusion_pipeline.datasets import is_id, is_list_of, is_number

RunLengths = dict[str, Any]  # {"size": [height, width], "counts": bytes}


def encode_outline(outline: Any, width: int, height: int) -> RunLengths:
    """A COCO segmentation of an image (polygons, run lengths or a list of these) as COCO's compressed run lengths.

    Raises a ValueError if it is malformed, because pycocotools would crash on it.
    """
    from pycocotools import mask

    parts = [outline] if isinstance(outline, dict) else outline
    if parts and is_list_of(lambda part: isinstance(part, dict))(parts):
        runs = [{"size": [height, width], "counts": run_lengths(part, width, height)} for part in parts]
        encoded = mask.merge([mask.frPyObjects(part, height, width) for part in runs])
    else:
        encoded = mask.merge(mask.frPyObjects(polygons(outline, width, height), height, width))
    if not mask.area(encoded):
        raise ValueError("an outline that covers no pixel")
    return encoded


def run_lengths(outline: dict[str, Any], width: int, height: int) -> list[int]:
    """The run lengths of unset, set, unset ... pixels in column order, from compressed or plain run lengths."""
    counts = outline.get("counts")
    runs: Any = decompress(counts) if isinstance(counts, str) else counts
    if not is_list_of(is_id)(runs) or min(runs, default=-1) < 0:
        raise ValueError("malformed run lengths")
    if outline.get("size") != [height, width] or sum(runs) != width * height:
        raise ValueError("run lengths of another size than their image")
    return runs


def decompress(counts: str) -> list[int] | None:
    """The run lengths in COCO's compressed string; None if it is malformed.

    Each character has five bits of a number, the lowest first, and a sixth bit that is set if more follow. From the
    fourth number on, the difference to the number two before is stored.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits < 32:
            signed = value - (1 << shift) if bits & 16 else value
            runs.append(signed + runs[-2] if len(runs) > 2 else signed)
            value = shift = 0
    return None if shift else runs


def polygons(outline: Any, width: int, height: int) -> list[list[float]]:
    """The polygons [x0, y0, x1, y1, ...] with at least three corners."""
    if not is_list_of(is_list_of(is_number))(outline) or any(len(polygon) % 2 for polygon in outline):
        raise ValueError("a malformed outline")
    found = [polygon for polygon in outline if len(polygon) >= 6]
    if not found:
        raise ValueError("no outline")
    if max(map(max, found)) <= 1:
        raise ValueError("an outline in relative coordinates instead of pixels")
    for polygon in found:
        for places, side in ((polygon[0::2], width), (polygon[1::2], height)):
            if min(places) < -side or max(places) > 2 * side:
                raise ValueError("an outline far outside its image")
    return found
