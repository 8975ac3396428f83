"""The scores of the small model in Markdown, as its card and the README have them."""

from collections.abc import Iterator, Mapping
from typing import Any

from held_out import CHANGES

OWN = "what was {}, by the model's own segmentation"  # its row
Scores = Mapping[str, Mapping[str, float]]  # metric -> whose -> value
PCK, MIOU = "PCK@0.05 of the side", "mIoU"
LEARNED = "learned reading"
SEGMENTATION = {
    "segmentation, seen names": "names and styles of training",
    "segmentation, unseen drawing style": "a drawing style never trained on",
    "segmentation, unseen names": "names never trained on",
}
JOINTS = {
    "one joint, facing": "one joint by name, facing",
    "one joint, from behind": "one joint by name, from behind",
    "keypoints, facing": "one to five joints by name, facing",
    "keypoints, from behind": "one to five joints by name, from behind",
    "pose, facing": '"show the pose", facing',
    "pose, from behind": '"show the pose", from behind',
}
RESTORED = {"noise": "noise, sigma 25", "blur": "blur", "watermark": "watermark"}
CLASSICAL = {"noise": "non-local means", "blur": "unsharp mask", "watermark": "inpainting the known mark"}


def table(
    results: Mapping[str, Any], beyond: Mapping[str, Mapping[str, float]], own_results: Mapping[str, Any]
) -> str:
    """Of what `evaluate` returned for the rows and for `own_cases`, and `beyond`.

    Shares from 0 to 1 and PSNR in dB; in brackets what the autoencoder alone allows.
    """
    scores, own = ({row["row"]: row["scores"] for row in found["rows"]} for found in (results, own_results))
    lines = ["| | this model | for comparison |", "| --- | --- | --- |"]
    for row, what in SEGMENTATION.items():
        lines += segmentation(what, scores[row], beyond[row])
    row = "segmentation, left or right of two"
    lines.append(
        f'| "the left one", "the right one" of two: the asked one painted best'
        f" | **{percent(beyond[row].get('the asked one of several'))}** | 50 % by chance |"
    )
    lines.append(overlap("mIoU of the asked one", scores[row][MIOU]))
    lines += [joints(what, scores[row], beyond[row]) for row, what in JOINTS.items()]
    for row in RESTORED:
        lines += restored(row, scores[row], beyond[row])
    for what in CHANGES:
        lines.append(changed(what, beyond[f"objects {what}"], own.get(OWN.format(what))))
    looks = scores["grades"]["PSNR"]
    lines.append(f"| looks of the picture: PSNR | {decibels(looks)} | {looks['input']:.1f} untouched |")
    return "\n".join(lines) + "\n"


def segmentation(what: str, scores: Scores, beyond: Mapping[str, float]) -> Iterator[str]:
    """How well, how often in vain, and whether the name mattered."""
    several, everything = (
        decimal(beyond.get(f"mIoU among several{painter}")) for painter in ("", ", all objects painted")
    )
    yield (
        f"| segmentation, {what}: mIoU where it is there | **{decimal(beyond.get('mIoU where present'))}**"
        f" | among several {several}; {everything} if all were painted |"
    )
    yield f"| ... painted though absent | **{percent(beyond.get('painted though absent'))}** | |"
    yield f"| ... the asked one of several painted best | **{percent(beyond.get('the asked one of several'))}** | |"
    yield overlap("mIoU with the absent ones", scores[MIOU])


def overlap(what: str, miou: Mapping[str, float]) -> str:
    """A line with the ceiling, and what the learned reading makes of the same answers if there is one."""
    again = f"{decimal(miou[LEARNED])} by the learned reading" if LEARNED in miou else ""
    return f"| ... {what} | **{decimal(miou['model'])}** ({decimal(miou['ceiling'])}) | {again} |"


def joints(what: str, scores: Scores, beyond: Mapping[str, float]) -> str:
    """One line."""
    confused, missed = (percent(beyond.get(name)) for name in ("left and right confused", "no disc"))
    again = f", {decimal(scores[PCK][LEARNED])} by the learned reading" if LEARNED in scores[PCK] else ""
    return (
        f"| {what}: PCK at 5 % of the side | **{decimal(scores[PCK]['model'])}** ({decimal(scores[PCK]['ceiling'])})"
        f" | sides confused {confused}, no disc {missed}{again} |"
    )


def restored(row: str, scores: Scores, beyond: Mapping[str, float]) -> Iterator[str]:
    """One line, and for watermarks a second one of what lies inside and outside the mark."""
    psnr = scores["PSNR"]
    others = f"{psnr['input']:.1f} input, {psnr['input through the VAE']:.1f} through the autoencoder"
    yield f"| {RESTORED[row]}: PSNR | {decibels(psnr)} | {others}, {psnr['classical']:.1f} {CLASSICAL[row]} |"
    if row == "watermark":
        marked = beyond["PSNR inside the change, input"]
        yield f"| ... inside the mark, outside it | {parts(beyond)} | {marked:.1f} marked |"


def changed(what: str, beyond: Mapping[str, float], own: Scores | None) -> str:
    """One line."""
    found = ""
    if own:
        shares = f"{decimal(own[MIOU]['model'])} ({decimal(own[MIOU]['ceiling'])})"
        found = f"; its own segmentation finds it with mIoU {shares}"
    others = f"{beyond['PSNR inside the change, input']:.1f} untouched"
    if what == "removed":
        others += f", {beyond['PSNR inside the change, inpainted']:.1f} inpainting the known place"
    return f"| object {what}: PSNR inside the change, outside | {parts(beyond)} | {others}{found} |"


def parts(beyond: Mapping[str, float]) -> str:
    """Decibels inside and outside of what the true answer changes."""
    inside, outside, *most = (
        beyond[f"PSNR {where} the change{whose}"] for whose in ("", ", ceiling") for where in ("inside", "outside")
    )
    return f"**{inside:.1f}, {outside:.1f} dB** ({most[0]:.1f}, {most[1]:.1f})"


def decibels(psnr: Mapping[str, float]) -> str:
    """The model's, and the ceiling."""
    return f"**{psnr['model']:.1f} dB** ({psnr['ceiling']:.1f})"


def decimal(score: float | None) -> str:
    """Of 1; a few samples may hold nothing to score."""
    return "-" if score is None else f"{score:.2f}"


def percent(share: float | None) -> str:
    """As a whole number; likewise."""
    return "-" if share is None else f"{100 * share:.0f} %"
