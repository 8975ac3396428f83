"""Pictures that show a reading on its input."""

from PIL import Image, ImageDraw

from instructdiffusion_pipeline.pipeline_instruct_diffusion import upright_rgb


def wipe(image: Image.Image, answer: Image.Image) -> Image.Image:
    """The left half of `image`, the right half of `answer` (of the same size), and a line between them."""
    sheet = upright_rgb(image)
    middle = sheet.width // 2
    sheet.paste(answer.crop((middle, 0, *answer.size)), (middle, 0))
    ImageDraw.Draw(sheet).line([(middle, 0), (middle, sheet.height)], "white", max(1, sheet.width // 200))
    return sheet
