"""Fine-tune a model, and write it as a folder that loads and can be pushed to the Hub.

    python examples/train.py --init path/to/model --data table=my-pictures --max_train_steps 2000 --output_dir out/run

--recipe selects the default settings for a stage of the paper (adaptation, multitask, alignment); other options
override them. --resume latest continues a run that was stopped. See docs/training.md.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import ModelCard, ModelCardData, create_repo
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import HfArgumentParser

from instructdiffusion_pipeline import export, push
from instructdiffusion_pipeline.cli import UsageError, check_runs, reading, run_script
from instructdiffusion_pipeline.datasets import AnnotatedImages
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.datasets.specs import DATASETS, columns_of, load_sources, parse_entries
from instructdiffusion_pipeline.files import atomic_write, write_text
from instructdiffusion_pipeline.fingerprint import differences
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
from instructdiffusion_pipeline.training.loop import check_tracker

CONVERTER = Path(__file__).parent.parent / "conversion" / "convert_original_checkpoint.py"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that are not empty, and the description with its line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


@dataclass
class FirstSamples:
    """The first `count` samples of a dataset."""

    dataset: AnnotatedImages[Any]
    count: int

    def __post_init__(self) -> None:
        self.skipped = self.dataset.skipped

    def __len__(self) -> int:
        return min(self.count, len(self.dataset))

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return self.dataset[index]

    def name(self, index: int) -> str:
        return self.dataset.name(index)


def option(help: str, action: str = "store", **others: Any) -> Any:
    """A dataclass field for a command-line option; `others` are arguments of `field`."""
    return field(metadata={"help": help, "action": action}, **others)


@dataclass
class Options:
    """The initial model of a run, its data, and its output."""

    init: str = option("folder or Hub id of InstructDiffusion or Stable Diffusion 1.5, or an original checkpoint")
    data: list[str] = option(
        f"datasets as NAME=FOLDER, one or several. NAME is one of {', '.join(DATASETS)}", action="extend"
    )
    output_dir: Path = option("folder for checkpoints, validation images, logs, and the trained model (in model/)")
    recipe: str = option(f"default settings for a stage of the paper: {', '.join(RECIPES)}", default="multitask")
    resolution: int | None = option(
        "side of the training images in pixels (default: 256, or the model's resolution if it is smaller)",
        default=None,
    )
    image_column: str = option("column of the input images in every table", default="original_image")
    instruction_column: str = option("column of the instructions in every table", default="edit_prompt")
    target_column: str = option("column of the edited images in every table", default="edited_image")
    split: str = option("split of every table in --data", default="train")
    revision: str | None = option("branch, tag or commit of tables on the Hub", default=None)
    random_flip: bool = option(
        "flip half of the samples of tables; not for instructions that say left or right", default=False
    )
    max_train_samples: int | None = option("use only the first N samples of every dataset", default=None)
    validation_data: list[str] = option(
        "datasets as in --data, for the validation loss and images: the test split of published datasets, and"
        " --validation_split of tables. Without it the images are of training samples",
        "extend",
        default_factory=list,
    )
    validation_split: str = option("split of every table in --validation_data", default="train")
    num_validation_images: int = option("number of validation images per task family", default=4)
    cache_samples: int | None = option("encode N samples once, and train only on these", default=None)
    conversion: str = option(f"options for {CONVERTER.name} in one string, if --init is a checkpoint", default="")
    resume: str | None = option("'latest' or the path of a checkpoint folder to resume from", default=None)
    resume_changes: list[str] = option(
        "settings that may differ from the checkpoint's, such as learning_rate, or content (the data)",
        "extend",
        default_factory=list,
    )
    validation_num_inference_steps: int | None = option(
        "number of denoising steps for validation images", default=None
    )
    push_to: str | None = option("OWNER/NAME of a Hub repository to push the trained model to", default=None)
    private: bool = option("make a new repository of --push_to private", default=False)
    license: str | None = option(
        "license of the trained weights as the Hub spells it, for the model card", default=None
    )


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
            f"--output_dir: {model} already exists. Publish it with examples/push_to_hub.py; or choose another folder;"
            " or move model/ and lora/ away and use --resume latest with a larger --max_train_steps."
        )
    entries = parse_entries(options.data)
    known = [
        (entry.key, entry.folder.resolve()) for entry in parse_entries(options.validation_data, "--validation_data")
    ]
    for entry in entries:
        if (entry.key, entry.folder.resolve()) in known and validation_split(entry.key, options) == train_split(
            entry.key, options
        ):
            raise UsageError(
                f"--validation_data: {entry.key}={entry.folder} is trained on; name other data or a split."
            )
    check_effects(options)
    for name in (
        "resolution",
        "max_train_samples",
        "num_validation_images",
        "cache_samples",
        "validation_num_inference_steps",
    ):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name}: must be at least 1; got {value}.")
    is_file_name = Path(options.init).suffix in {".ckpt", ".safetensors", ".pth", ".pt"}
    if not Path(options.init).exists() and (options.init.count("/") != 1 or is_file_name):
        raise UsageError(f"--init: there is no file or folder {options.init}.")
    # Before training, so that an error is raised early.
    check_tracker(config.report_to)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if options.push_to and state.is_main_process:
        validate_repo_id(options.push_to)
        ModelCard(f"---\n{ModelCardData(license=options.license)}\n---\n").validate()
        create_repo(options.push_to, private=options.private or None, exist_ok=True)
    with state.main_process_first():
        start = converted(options.init, options.output_dir, options.conversion)
    with reading(f"--init: no pipeline could be loaded from {start}") if Path(start).exists() else nullcontext():
        pipeline = load_for_training(start)
    check_runs(pipeline, f"--init: the pipeline of {start} cannot run")
    size = options.resolution or min(256, pipeline.default_resolution)
    if size % pipeline.size_multiple:
        raise UsageError(f"--resolution: must be a multiple of {pipeline.size_multiple}; got {size}.")
    sources = training_sources(options, size)
    mixture = Mixture(sources, config.seed)
    config = config.for_samples(options.cache_samples or len(mixture), state.num_processes)
    about = summary(mixture, sources, config, state.num_processes, options.cache_samples)
    if state.is_main_process:
        print(about)
    samples = ImageDataset(mixture, pipeline.tokenizer)
    if options.cache_samples:
        samples = cache_samples(
            samples,
            options.cache_samples,
            pipeline.to(state.device),
            options.output_dir / "cache",
            embeddings=not config.train_text_encoder,
            num_workers=config.num_workers,
            seed=config.seed,
        )
    held_out = Mixture(validation_sources(options, size), config.seed) if options.validation_data else None
    questions = validation_examples(held_out or mixture, pipeline.config.task_settings, options.num_validation_images)
    steps = options.validation_num_inference_steps
    if steps is not None:
        questions = [
            replace(question, settings={**question.settings, "num_inference_steps": steps}) for question in questions
        ]

    pipeline = train(
        pipeline,
        samples,
        config,
        options.output_dir,
        options.resume,
        questions,
        ImageDataset(held_out, pipeline.tokenizer) if held_out else None,
        options.resume_changes,
    )

    if not state.is_main_process:
        return
    if config.lora_rank:
        save_lora(pipeline, options.output_dir / "lora")
        pipeline = load_for_training(start)
        pipeline.load_lora_weights(options.output_dir / "lora")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    # Written atomically, so that a run killed here can be resumed.
    with atomic_write(model) as partial:
        export(pipeline, partial, options.license)
        describe(partial, options, config, size, about)
    print(f"The model is in {model}")
    if options.push_to:
        print(push(pipeline, options.push_to, private=options.private or None, card_folder=model))


def check_effects(options: Options) -> None:
    """Raise a UsageError if an option was given that has no effect on this run."""
    trained, held_out = (
        [entry.folder for entry in parse_entries(entries) if entry.key == "table"]
        for entries in (options.data, options.validation_data)
    )
    either = trained + held_out, "a table in --data or --validation_data"
    on_hub = [folder for folder in trained + held_out if not folder.exists()]
    needs = {
        **dict.fromkeys(("image_column", "instruction_column", "target_column"), either),
        "revision": (on_hub, "a table on the Hub in --data or --validation_data"),
        **dict.fromkeys(("split", "random_flip"), (trained, "a table in --data")),
        "validation_split": (held_out, "a table in --validation_data"),
        "conversion": (Path(options.init).is_file(), "a checkpoint file as --init"),
        "resume_changes": (options.resume is not None, "--resume"),
        "private": (options.push_to, "--push_to"),
    }
    defaults = Options("", [], Path())
    for name, (has_effect, needed) in needs.items():
        if getattr(options, name) != getattr(defaults, name) and not has_effect:
            raise UsageError(f"--{name}: has an effect with {needed} only.")


def train_split(key: str, options: Options) -> str:
    """The split of a dataset for training."""
    return options.split if key == "table" else DATASETS[key].train_split


def validation_split(key: str, options: Options) -> str:
    """The split of a dataset for validation."""
    spec = DATASETS[key]
    return options.validation_split if key == "table" else spec.test_split or spec.train_split


def table_options(options: Options, split: str) -> dict[str, str]:
    """The arguments of `HubTable.load` for every table."""
    columns = {
        "image": options.image_column,
        "instruction": options.instruction_column,
        "edited": options.target_column,
    }
    return columns | {"split": split} | ({"revision": options.revision} if options.revision else {})


def training_sources(options: Options, size: int) -> list[tuple[Source, float]]:
    """The sources of --data, with images of `size` x `size` pixels, and their weights."""
    sources = []
    loaded = load_sources(options.data, size, table_options(options, options.split))
    for entry, (source, weight) in zip(parse_entries(options.data), loaded, strict=True):
        if entry.key == "table" and options.random_flip:
            source = replace(source, transform=replace(source.transform, flip=0.5))
        if options.max_train_samples:
            source = replace(source, dataset=FirstSamples(source.dataset, options.max_train_samples))
        sources.append((source, weight))
    return sources


def validation_sources(options: Options, size: int) -> list[tuple[Source, float]]:
    """The sources of --validation_data, cropped like those of --data, and their weights."""
    sources = []
    for entry in parse_entries(options.validation_data, "--validation_data"):
        spec = replace(DATASETS[entry.key], train_split=validation_split(entry.key, options))
        columns = columns_of(entry, table_options(options, options.validation_split))
        sources.append(spec.source(entry.name, entry.folder, size, **columns))
    return sources


def describe(folder: Path, options: Options, config: TrainingConfig, size: int, about: str) -> None:
    """Add the datasets, the settings and the last validation images to the model card in `folder`."""
    card = ModelCard.load(folder / "README.md")
    start = Path(options.init).name
    if not Path(options.init).exists():
        start = card.data.base_model = options.init
    of_data = ("random_flip", "max_train_samples", "cache_samples")
    settings = {"resolution": size} | {name: getattr(options, name) for name in of_data} | asdict(config)
    settings = {name: value for name, value in settings.items() if value is not None}
    text = f"""
## Training

Trained from `{start}` with `examples/train.py`.

```
{about}
```

```json
{json.dumps(settings, indent=2)}
```
"""
    pictures = options.output_dir / "validation" / f"step-{config.max_train_steps:06d}.png"
    if pictures.is_file():
        shutil.copyfile(pictures, folder / "validation.png")
        kind = "held-out" if options.validation_data else "training"
        text += f"\nInput, output and target of {kind} samples:\n\n![Validation images](validation.png)\n"
    card.text += text
    card.save(folder / "README.md")


def summary(
    mixture: Mixture,
    sources: Sequence[tuple[Source, float]],
    config: TrainingConfig,
    processes: int,
    cached: int | None,
) -> str:
    """A table of the sources with their samples, weights and fractions, and the number of epochs."""
    width = max(6, *(len(source.name) for source, _ in sources))
    lines = [f"{'source':{width}}     samples    weight fraction"]
    for (source, weight), count in zip(sources, mixture.counts, strict=True):
        fraction = count / len(mixture)
        lines.append(f"{source.name:{width}}{len(source.dataset):12,}{weight:10.3g}{fraction:9.1%}")
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
    folder, file = output_dir / "start", Path(init).resolve()
    source = {"init": str(file), "bytes": file.stat().st_size, "time": file.stat().st_mtime_ns, "conversion": options}
    if not folder.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder) as partial:
            own = ["--checkpoint_path", init, "--dump_path", str(partial)]
            if subprocess.run([sys.executable, str(CONVERTER), *own, *shlex.split(options)]).returncode:
                raise UsageError(f"--init: {init} was not converted (see above). Pass options with --conversion.")
            write_text(partial / "conversion.json", json.dumps(source, indent=2) + "\n")
        return str(folder)
    record = folder / "conversion.json"
    with reading(f"--init: {record} is missing or damaged; delete {folder}, or change --output_dir"):
        before = dict(json.loads(record.read_text()))
    if other := differences(before, source):
        raise UsageError(f"--init: {folder} has another conversion: {other}. Delete it, or change --output_dir.")
    return str(folder)


if __name__ == "__main__":
    run_script(main)
