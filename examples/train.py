"""Fine-tune a model, and leave it as a folder that loads and can be pushed to the Hub.

    python examples/train.py --init path/to/model --data table=my-pictures --max_train_steps 2000 --output_dir out/run

--recipe chooses the stage of the paper (adaptation, multitask, alignment); every setting can be changed beside it.
With --resume latest a run that was stopped goes on. docs/training.md is the guide.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import load_dataset
from transformers import HfArgumentParser

from instructdiffusion_pipeline import FAMILIES, export, load_presets, model_resolution, push
from instructdiffusion_pipeline.datasets.captions import coco_captions, img2dataset
from instructdiffusion_pipeline.datasets.editing import HubTable
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.datasets.preferences import load_preferences
from instructdiffusion_pipeline.datasets.specs import ORIGINAL, DatasetSpec
from instructdiffusion_pipeline.datasets.transforms import Resize, SquareCrop
from instructdiffusion_pipeline.tasks.adaptation import Adaptation
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import (
    RECIPES,
    ImageDataset,
    TrainingConfig,
    cache_samples,
    load_start,
    save_lora,
    train,
    validation_questions,
)

CONVERTER = Path(__file__).parent.parent / "conversion" / "convert_original_checkpoint.py"
DATA = ORIGINAL | {
    "table": DatasetSpec(
        "", lambda folder: HubTable(load_dataset(str(folder), split="train")), Editing.from_annotation, Resize()
    ),
    "preferences": DatasetSpec("", load_preferences, Editing.from_annotation, Resize()),
    "captions": DatasetSpec("", img2dataset, Adaptation.from_annotation, SquareCrop()),
    "coco-captions": DatasetSpec("", coco_captions, Adaptation.from_annotation, SquareCrop()),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the description as it stands."""


def option(help: str, **others: Any) -> Any:
    """A field of the command line with its words for --help."""
    return field(metadata={"help": help}, **others)


@dataclass
class Options:
    """What a run starts from, learns from, and leaves."""

    init: str = option("folder or Hub id of InstructDiffusion or Stable Diffusion 1.5, or an original checkpoint")
    data: list[str] = option(f"NAME=FOLDER, any number of them; NAME is one of {', '.join(DATA)}")
    output_dir: Path = option("for checkpoints, pictures and logs, and the trained model in model/")
    recipe: str = option(f"stage whose settings are the defaults: {', '.join(RECIPES)}", default="multitask")
    resolution: int | None = option("side of the pictures; 256, or less if the model is smaller", default=None)
    cache_samples: int | None = option("encode so many samples once and train on these alone", default=None)
    conversion: str = option(f"options for {CONVERTER.name}, in one string, if --init is a checkpoint", default="")
    resume: str | None = option("'latest', or the folder of a checkpoint", default=None)
    validation_num_inference_steps: int | None = option("of validation pictures", default=None)
    push_to: str | None = option("OWNER/NAME of a Hub repository for the trained model", default=None)


def main() -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=list(RECIPES), default="multitask")
    parser = HfArgumentParser([Options, TrainingConfig], description=__doc__, formatter_class=HelpFormatter)
    parser.set_defaults(**RECIPES[first.parse_known_args()[0].recipe])
    try:
        options, config = parser.parse_args_into_dataclasses()
        run(options, config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(options: Options, config: TrainingConfig) -> None:
    """Load, mix, train, and write the model."""
    model = options.output_dir / "model"
    if model.exists():
        raise ValueError(
            f"--output_dir: {model} is there already, from a run that ended; name another folder, or move model/ (and"
            " lora/) away if --resume is to make that run longer."
        )
    for entry in options.data:
        check_entry(entry)
    is_file_name = Path(options.init).suffix in {".ckpt", ".safetensors", ".pth", ".pt"}
    if not Path(options.init).exists() and (options.init.count("/") != 1 or is_file_name):
        raise ValueError(f"--init: there is no file or folder {options.init}.")
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first():
        start = converted(options.init, options.output_dir, options.conversion)
    pipeline, presets = load_start(start), load_presets(start)
    size = options.resolution or min(256, model_resolution(pipeline))
    mixture = Mixture([source(entry, size) for entry in options.data], config.seed)
    samples = ImageDataset(mixture, pipeline.tokenizer)
    if options.cache_samples:
        with state.main_process_first():
            samples = cache_samples(
                samples,
                options.cache_samples,
                pipeline.to(state.device),
                options.output_dir / "cache",
                embeddings=not config.train_text_encoder,
                num_workers=config.num_workers,
                seed=config.seed,
            )
    own_steps = options.validation_num_inference_steps
    few = {"num_inference_steps": own_steps} if own_steps else {}
    settings = {family: {**presets.get(family, {}), **few} for family in (*FAMILIES, "adaptation")}
    questions = validation_questions(mixture, settings)

    pipeline = train(pipeline, samples, config, options.output_dir, options.resume, questions)

    if not state.is_main_process:
        return
    if config.lora_rank:
        save_lora(pipeline, options.output_dir / "lora")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    export(pipeline, model)
    if presets:
        (model / "presets.json").write_text(json.dumps(presets, indent=2) + "\n")
    print(f"The model is in {model}")
    if options.push_to:
        print(push(pipeline, options.push_to))


def converted(init: str, output_dir: Path, options: str) -> str:
    """`init`, or the folder that an original checkpoint of that name was converted to."""
    if not Path(init).is_file():
        return init
    folder = output_dir / "start"
    if not folder.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        own = ["--checkpoint_path", init, "--dump_path", str(folder)]
        if subprocess.run([sys.executable, str(CONVERTER), *own, *shlex.split(options)]).returncode:
            raise ValueError(f"--init: {init} was not converted, see above. --conversion takes the script's options.")
    return str(folder)


def source(entry: str, size: int) -> tuple[Source, float]:
    """NAME=FOLDER as a source and its weight."""
    check_entry(entry)
    name, _, folder = entry.partition("=")
    return DATA[name].source(name, Path(folder), size)


def check_entry(entry: str) -> None:
    """Raise a ValueError unless `entry` is NAME=FOLDER, with a known name and a folder, or a Hub id for a table."""
    name, equals, folder = entry.partition("=")
    if name not in DATA or not equals:
        raise ValueError(f"--data must be NAME=FOLDER with a NAME out of {', '.join(DATA)}; got {entry!r}.")
    if not Path(folder).exists() and (name != "table" or folder.count("/") != 1):
        raise ValueError(f"--data {name}: there is no folder {folder}.")


if __name__ == "__main__":
    main()
