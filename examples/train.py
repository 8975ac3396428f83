"""Fine-tune a model, and write it as a folder that loads and can be pushed to the Hub.

    python examples/train.py --init path/to/model --data table=my-pictures --max_train_steps 2000 --output_dir out/run

--recipe chooses a stage of the paper (adaptation, multitask, alignment); each of its settings can be changed by its
own option. With --resume latest a run that was stopped continues. docs/training.md is the guide.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import create_repo
from transformers import HfArgumentParser

from instructdiffusion_pipeline import export, push
from instructdiffusion_pipeline.cli import UsageError, run_script
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_sources, parse_entries
from instructdiffusion_pipeline.training import (
    RECIPES,
    ImageDataset,
    TrainingConfig,
    cache_samples,
    load_for_training,
    save_lora,
    train,
    validation_examples,
)

CONVERTER = Path(__file__).parent.parent / "conversion" / "convert_original_checkpoint.py"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None, and the description with its line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def option(help: str, action: str = "store", **others: Any) -> Any:
    """A command line option: its --help, how argparse stores it, and the arguments of its dataclass field."""
    return field(metadata={"help": help, "action": action}, **others)


@dataclass
class Options:
    """The model that a run starts from, its data, and where it writes."""

    init: str = option("folder or Hub id of InstructDiffusion or Stable Diffusion 1.5, or an original checkpoint")
    data: list[str] = option(f"NAME=FOLDER, once or several times; NAME: {', '.join(DATASETS)}", action="extend")
    output_dir: Path = option("folder for checkpoints, validation pictures, logs, and the trained model in model/")
    recipe: str = option(
        f"stage of the paper whose settings are the defaults: {', '.join(RECIPES)}", default="multitask"
    )
    resolution: int | None = option(
        "side of the training pictures; if not given: 256, or the model's size if it is smaller", default=None
    )
    image_column: str = option("column of the input pictures in every table", default="original_image")
    instruction_column: str = option("column of the instructions in every table", default="edit_prompt")
    target_column: str = option("column of the edited pictures in every table", default="edited_image")
    cache_samples: int | None = option("encode this many samples once, and train on these only", default=None)
    conversion: str = option(f"options of {CONVERTER.name}, in one string, if --init is a checkpoint", default="")
    resume: str | None = option("continue from a checkpoint: 'latest', or its folder", default=None)
    validation_num_inference_steps: int | None = option("denoising steps of validation pictures", default=None)
    push_to: str | None = option("OWNER/NAME of a Hub repository to push the trained model to", default=None)


def main() -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=list(RECIPES), default="multitask")
    parser = HfArgumentParser([Options, TrainingConfig], description=__doc__, formatter_class=HelpFormatter)
    parser.set_defaults(**RECIPES[first.parse_known_args()[0].recipe])
    try:
        options, config = parser.parse_args_into_dataclasses()
        run(options, config)
    except ValueError as error:
        raise UsageError(error) from error


def run(options: Options, config: TrainingConfig) -> None:
    """Load the model and the data, train, and write the model."""
    model = options.output_dir / "model"
    if model.exists():
        raise UsageError(
            f"--output_dir: {model} exists, from a run that has ended. Give another folder; or move model/ (and lora/)"
            " away, and continue that run with --resume and more steps."
        )
    parse_entries(options.data)
    is_file_name = Path(options.init).suffix in {".ckpt", ".safetensors", ".pth", ".pt"}
    if not Path(options.init).exists() and (options.init.count("/") != 1 or is_file_name):
        raise UsageError(f"--init: there is no file or folder {options.init}.")
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if options.push_to and state.is_main_process:
        create_repo(options.push_to, exist_ok=True)  # a refusal must come before the training
    with state.main_process_first():
        start = converted(options.init, options.output_dir, options.conversion)
    pipeline = load_for_training(start)
    size = options.resolution or min(256, pipeline.default_resolution)
    columns = {
        "image": options.image_column,
        "instruction": options.instruction_column,
        "edited": options.target_column,
    }
    sources = load_sources(options.data, size, columns)
    mixture = Mixture(sources, config.seed)
    if state.is_main_process:
        print(summary(mixture, sources, config, state.num_processes, options.cache_samples))
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
    questions = validation_examples(mixture, pipeline.config.task_settings)
    if steps := options.validation_num_inference_steps:
        questions = [
            replace(question, settings={**question.settings, "num_inference_steps": steps}) for question in questions
        ]

    pipeline = train(pipeline, samples, config, options.output_dir, options.resume, questions)

    if not state.is_main_process:
        return
    if config.lora_rank:
        save_lora(pipeline, options.output_dir / "lora")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    export(pipeline, model)
    print(f"The model is in {model}")
    if options.push_to:
        print(push(pipeline, options.push_to))


def summary(
    mixture: Mixture,
    sources: Sequence[tuple[Source, float]],
    config: TrainingConfig,
    processes: int,
    cached: int | None,
) -> str:
    """A table of the sources with their samples, weights and shares, and the number of epochs."""
    width = max(6, *(len(source.name) for source, _ in sources))
    lines = [f"{'source':{width}}     samples    weight    share"]
    for (source, weight), count in zip(sources, mixture.counts, strict=True):
        share = count / len(mixture)
        lines.append(f"{source.name:{width}}{len(source.dataset):12,}{weight:10.3g}{share:9.1%}")
    per_update = config.batch_size * config.gradient_accumulation_steps * processes
    epoch = cached or len(mixture)
    lines.append(
        f"{config.max_train_steps:,} updates of {per_update:,} samples are"
        f" {config.max_train_steps * per_update / epoch:.3g} epochs of {epoch:,}{' cached' * bool(cached)} samples."
    )
    return "\n".join(lines)


def converted(init: str, output_dir: Path, options: str) -> str:
    """`init`; if it is an original checkpoint, the folder that it was converted to."""
    if not Path(init).is_file():
        return init
    folder = output_dir / "start"
    if not folder.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        own = ["--checkpoint_path", init, "--dump_path", str(folder)]
        if subprocess.run([sys.executable, str(CONVERTER), *own, *shlex.split(options)]).returncode:
            raise UsageError(f"--init: {init} was not converted, see above. --conversion takes the script's options.")
    return str(folder)


if __name__ == "__main__":
    run_script(main)
