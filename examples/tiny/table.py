"""The table of scores in the model card."""

from collections.abc import Iterator, Mapping
from typing import Any

from held_out import CHANGES, COUNT_ROWS, SIZE_ROWS

OWN = "what was {}, by the model's own segmentation"  # row of `own_results`
Scores = Mapping[str, Mapping[str, float]]  # metric -> column -> value
PCK, MIOU = "PCK@0.05 of the side", "mIoU"
BY_COLOR = "decoding by color"
SEGMENTATION = {
    "segmentation, seen names": "names and styles of training",
    "segmentation, unseen drawing style": "a drawing style not used in training",
    "segmentation, unseen names": "names not used in training",
}
JOINTS = {
    "one joint, facing": "one joint by name, figure facing the viewer",
    "one joint, from behind": "one joint by name, figure seen from behind",
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
    """Return the table in Markdown, with the VAE's ceiling in parentheses.

    Args:
        results: what `evaluate` returned for the rows of `held_out`.
        beyond: what `score.beyond` returned.
        own_results: what `evaluate` returned for `score.own_cases`.
    """
    scores, own = ({row["row"]: row["scores"] for row in result["rows"]} for result in (results, own_results))
    lines = ["| task: metric | this model | for comparison |", "| --- | --- | --- |"]
    for row, what in SEGMENTATION.items():
        lines += segmentation(what, scores[row], beyond[row])
    row = "segmentation, left or right of two"
    lines.append(
        f'| "the left ...", "the right ..." of two: accuracy'
        f" | **{percent(beyond[row].get('the asked one of several'))}** | 50 % by chance |"
    )
    lines.append(overlap("mIoU", scores[row][MIOU]))
    names = {row: row for row in SIZE_ROWS}
    for (row, count), number in zip(COUNT_ROWS.items(), ("one", "two", "three", "four"), strict=True):
        names[row] = row.replace(f"{count} of", f"{number} object{'s' * (count > 1)} of")
    lines += [layout(name, scores[row][MIOU], beyond[row]) for row, name in names.items()]
    lines += [joints(what, scores[row], beyond[row]) for row, what in JOINTS.items()]
    for row in RESTORED:
        lines += restored(row, scores[row], beyond[row])
    for what in CHANGES:
        lines.append(changed(what, beyond[f"objects {what}"], own.get(OWN.format(what))))
    psnr = scores["color edits"]["PSNR"]
    lines.append(f"| color edits: PSNR | {decibels(psnr)} | {psnr['input']:.1f} input |")
    return "\n".join(lines) + "\n"


def segmentation(what: str, scores: Scores, beyond: Mapping[str, float]) -> Iterator[str]:
    """The lines of a segmentation row: mIoU, false-positive rate, and accuracy in choosing the named object."""
    several, everything = (decimal(beyond.get(f"mIoU among several{kind}")) for kind in ("", ", all objects painted"))
    yield (
        f"| segmentation, {what}: mIoU on images with the object | **{decimal(beyond.get('mIoU where present'))}**"
        f" | {several} on images with several objects; {everything} if every object were masked |"
    )
    rate = percent(beyond.get("painted though absent"))
    yield f"| ... false-positive rate on images without the object | **{rate}** | |"
    asked_best = percent(beyond.get("the asked one of several"))
    yield f"| ... accuracy: highest IoU with the named object | **{asked_best}** | |"
    yield overlap("mIoU including images without the object", scores[MIOU])


def layout(row: str, miou: Mapping[str, float], beyond: Mapping[str, float]) -> str:
    """The line of a row of objects of a certain size or number, in a drawing style not used in training."""
    asked_best = percent(beyond.get("the asked one of several"))
    ours = f"**{decimal(miou['model'])}** ({decimal(miou['ceiling'])})"
    others = f"accuracy {asked_best}{also_by_color(miou)}"
    return f"| {row}, a drawing style not used in training: mIoU | {ours} | {others} |"


def overlap(what: str, miou: Mapping[str, float]) -> str:
    """A line with the mIoU, also of decoding by color if the model has a readout."""
    by_color = f"{decimal(miou[BY_COLOR])} decoded by color" if BY_COLOR in miou else ""
    return f"| ... {what} | **{decimal(miou['model'])}** ({decimal(miou['ceiling'])}) | {by_color} |"


def joints(what: str, scores: Scores, beyond: Mapping[str, float]) -> str:
    """The line of a keypoint row."""
    confused, missed = (percent(beyond.get(name)) for name in ("left and right confused", "no disc"))
    return (
        f"| {what}: PCK at 5 % of the side | **{decimal(scores[PCK]['model'])}** ({decimal(scores[PCK]['ceiling'])})"
        f" | left and right swapped {confused}, not detected {missed}{also_by_color(scores[PCK])} |"
    )


def also_by_color(columns: Mapping[str, float]) -> str:
    """The score of decoding by color for the end of a line, if the model has a readout."""
    return f", {decimal(columns[BY_COLOR])} decoded by color" if BY_COLOR in columns else ""


def restored(row: str, scores: Scores, beyond: Mapping[str, float]) -> Iterator[str]:
    """The line of a restoration row, and for watermarks a second one with PSNR inside and outside the watermark."""
    psnr = scores["PSNR"]
    others = f"{psnr['input']:.1f} input, {psnr['input through the VAE']:.1f} through the VAE"
    yield f"| {RESTORED[row]}: PSNR | {decibels(psnr)} | {others}, {psnr['classical']:.1f} {CLASSICAL[row]} |"
    if row == "watermark":
        marked = beyond["PSNR inside the change, input"]
        where = "inside and outside the watermark"
        yield f"| ... PSNR of the output alone, {where} | {parts(beyond)} | {marked:.1f} input |"


def changed(what: str, beyond: Mapping[str, float], own: Scores | None) -> str:
    """The line of an edit of objects."""
    segmented = ""
    if own:
        miou = f"{decimal(own[MIOU]['model'])} ({decimal(own[MIOU]['ceiling'])} on the ground truth)"
        segmented = f"; segmentation of the new object by this model: mIoU {miou}"
    others = f"{beyond['PSNR inside the change, input']:.1f} input"
    if what == "removed":
        others += f", {beyond['PSNR inside the change, inpainted']:.1f} biharmonic inpainting with the known mask"
    where = "inside and outside the change"
    return f"| object {what}: PSNR of the output alone, {where} | {parts(beyond)} | {others}{segmented} |"


def parts(beyond: Mapping[str, float]) -> str:
    """PSNR inside and outside the region that the ground truth changes, with the ceilings in parentheses."""
    inside, outside, *ceilings = (
        beyond[f"PSNR {where} the change{column}"] for column in ("", ", ceiling") for where in ("inside", "outside")
    )
    return f"**{inside:.1f}, {outside:.1f} dB** ({ceilings[0]:.1f}, {ceilings[1]:.1f})"


def decibels(psnr: Mapping[str, float]) -> str:
    """PSNR of the model, with the ceiling in parentheses."""
    return f"**{psnr['model']:.1f} dB** ({psnr['ceiling']:.1f})"


def decimal(score: float | None) -> str:
    """Format a score from 0 to 1; "-" if no sample could be scored."""
    return "-" if score is None else f"{score:.2f}"


def percent(fraction: float | None) -> str:
    """Format a fraction in percent; "-" if no sample could be scored."""
    return "-" if fraction is None else f"{100 * fraction:.0f} %"
