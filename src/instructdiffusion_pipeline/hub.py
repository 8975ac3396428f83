"""Write a pipeline to a folder together with its code, and push such a folder to the Hub.

`save_pretrained` writes weights and settings; loading them needs this package. `export` and `push` also write the
files of the pipeline and of its blocks, and name them in `model_index.json`, `modular_config.json` and
`modular_model_index.json`, so that loading does not need this package.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import ModularPipeline
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, model_info, upload_folder

from . import modular_instruct_diffusion
from .files import atomic_write
from .modular_instruct_diffusion import InstructDiffusionBlocks
from .pipeline_instruct_diffusion import InstructDiffusionPipeline, add_code

# The weight files that diffusers and transformers write to a component's folder, sharded or not.
_WEIGHTS = re.compile(r"([^/]+)/(diffusion_)?(pytorch_)?model[.-][^/]*(safetensors|bin|index(\.[^/]+)?\.json)")

# The files that a model card may refer to.
_CARD_FILES = re.compile(r"(LICENSE|NOTICE|[^.].*\.(md|txt|gif|jpe?g|png|svg|webp))", re.IGNORECASE)

_CARD = """
# {name}

An InstructDiffusion model. Its inputs are an image and a text instruction; its output is an image.

Load it without this package. This runs the file `pipeline_instruct_diffusion.py` of this repository, so read that file
before you trust it:

```python
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

pipe = DiffusionPipeline.from_pretrained("{name}"{variant}, trust_remote_code=True)
answer = pipe("make it winter", load_image("photo.jpg")).images[0]
```

The image is cropped as in the original code, and the result is enlarged from the working size of the model.

With the package `instructdiffusion_pipeline` installed, its code is used, and `trust_remote_code` is not needed. `ask`
uses the whole image and keeps its resolution:

```python
from diffusers.utils import load_image
from instructdiffusion_pipeline import Editing, InstructDiffusionPipeline, ask

pipe = InstructDiffusionPipeline.from_pretrained("{name}"{variant})
answer = ask(pipe, load_image("photo.jpg"), Editing("make it winter")).data
```
"""


def export(
    pipeline: InstructDiffusionPipeline,
    path: str | os.PathLike[str],
    license: str | None = None,
    variant: str | None = None,
) -> Path:
    """Write weights, settings, code and model card to a new folder, atomically.

    The folder loads with `InstructDiffusionPipeline.from_pretrained(path)`, and without this package with
    `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)` or, as blocks, with
    `ModularPipeline.from_pretrained(path, trust_remote_code=True)`. Its code is that of this package.

    Args:
        pipeline: the pipeline to write; the weights keep their precision.
        path: the new folder. Missing parents are created.
        license: the license of the weights, as the Hub spells it (`"mit"`, `"cc-by-4.0"`, ...), for the model card.
        variant: part of the names of the weight files, such as `"fp16"`; loading them needs the same `variant`.

    Returns:
        `path`.

    Raises:
        TypeError: if `pipeline` is not an `InstructDiffusionPipeline`.
        ValueError: if `pipeline` has LoRA layers or an IP-Adapter.
        FileExistsError: if `path` exists; it is not changed.
    """
    _check(pipeline)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"`path` must be a new folder, but {path} already exists.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        _write(pipeline, partial, path.name, license, variant)
    return path


def push(
    pipeline: InstructDiffusionPipeline,
    repo_id: str,
    private: bool | None = None,
    license: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    card_folder: str | os.PathLike[str] | None = None,
) -> str:
    """Upload weights, settings, code and model card to a model repository on the Hub, in one commit.

    A missing repository is created. If the repository already contains a pipeline, the weight files of its components
    are replaced; with `variant`, only those of that variant. Other files and an existing model card are not changed.

    Args:
        pipeline: the pipeline to upload; the weights keep their precision.
        repo_id: `"owner/name"`, or `"name"` for a repository of the token's owner.
        private: whether a new repository is private. `None` uses the owner's default.
        license: the license of the weights, as the Hub spells it, for a new model card.
        variant: part of the names of the weight files, such as `"fp16"`; loading them needs the same `variant`.
        token: a token with write access. `None` uses that of `hf auth login` or of the variable `HF_TOKEN`.
        revision: the branch to commit to, which must exist. `None` is the main branch.
        commit_message: the title of the commit. `None` uses that of huggingface_hub.
        create_pr: whether to open a pull request instead of committing to the branch.
        card_folder: the folder of a model whose card is used for a repository without a card, with the name of the
            repository in place of its own. Images and texts next to the card are uploaded too. `None` writes a short
            card.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        TypeError: if `pipeline` is not an `InstructDiffusionPipeline`.
        ValueError: if `pipeline` has LoRA layers or an IP-Adapter, or `card_folder` has no model card.
        huggingface_hub.errors.HFValidationError: if `repo_id` is not a valid name.
        huggingface_hub.errors.HTTPError: if the Hub cannot be reached or rejects the request. No commit is made then.
    """
    _check(pipeline)
    if card_folder is not None and not Path(card_folder, "README.md").is_file():
        raise ValueError(f"`card_folder` must be a folder with a README.md; got {card_folder}.")
    # Before the weights are written, so that an invalid name or token raises an error at once.
    repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
    present, weights = _earlier_push(repo_id, revision, token)
    if variant is not None:
        weights = [path for path in weights if re.search(rf"\.{re.escape(variant)}[.-]", path)]
    with tempfile.TemporaryDirectory() as scratch:
        _write(pipeline, Path(scratch), repo_id, license, variant, repo_id)
        if card_folder is not None and "README.md" not in present:
            _copy_card(Path(card_folder), Path(scratch), repo_id, license, variant, present)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=scratch,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=["README.md"] if "README.md" in present else None,
            # Otherwise weight files with other names (shards, variants, .bin) could be loaded instead of the new ones.
            delete_patterns=weights,
        )
    return commit.pr_url or commit.commit_url


def _earlier_push(repo_id: str, revision: str | None, token: str | None) -> tuple[set[str], list[str]]:
    """All files of a repository, and those that are weights of the pipeline in its `model_index.json`."""
    info = model_info(repo_id, revision=revision, token=token)
    present = {file.rfilename for file in info.siblings or []}
    name = InstructDiffusionPipeline.config_name
    if name not in present:
        return present, []
    file = hf_hub_download(repo_id, name, revision=info.sha, token=token)
    index = json.loads(Path(file).read_text(encoding="utf-8"))
    # A component's entry is [library, class], or [null, null] if the pipeline has none.
    components = {key for key, value in index.items() if key[0] != "_" and isinstance(value, list) and value[0]}
    matches = map(_WEIGHTS.fullmatch, sorted(present))
    return present, [match[0] for match in matches if match and match[1] in components]


def _check(pipeline: InstructDiffusionPipeline) -> None:
    # Compared by name, because a pipeline loaded with `trust_remote_code=True` has the class in its folder's file.
    found = type(pipeline).__name__
    if found != InstructDiffusionPipeline.__name__:
        raise TypeError(f"`pipeline` must be an {InstructDiffusionPipeline.__name__}; got {found}.")
    pipeline.check_no_adapters()


def _write(
    pipeline: InstructDiffusionPipeline,
    folder: Path,
    name: str,
    license: str | None,
    variant: str | None,
    repo_id: str | None = None,
) -> None:
    pipeline.save_pretrained(folder, variant=variant)
    add_code(folder)
    _add_blocks(pipeline, folder, variant, repo_id)
    for file in (folder / pipeline.config_name, *folder.glob("*/config.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        # The local path from which the weights were loaded.
        settings.pop("_name_or_path", None)
        if "dtype" in settings:
            # Without `dtype=`, transformers loads a model in this precision, and diffusers loads its own in float32.
            settings["dtype"] = "float32"
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    data = ModelCardData(
        license=license, library_name="diffusers", pipeline_tag="image-to-image", tags=["instructdiffusion"]
    )
    text = _CARD.format(name=name, variant=_variant_argument(variant))
    ModelCard(f"---\n{data}\n---\n{text}").save(folder / "README.md")


def _copy_card(
    source: Path, folder: Path, repo_id: str, license: str | None, variant: str | None, present: set[str]
) -> None:
    """Replace the model card in `folder` by that of the model in `source`, and copy the files next to it.

    Files that are `present` in the repository are not copied. The model's name is the first heading of its card, and
    the last part of the path that the card loads.
    """
    for file in source.iterdir():
        if file.is_file() and _CARD_FILES.fullmatch(file.name) and file.name not in present:
            shutil.copyfile(file, folder / file.name)
    card = ModelCard.load(source / "README.md")
    if heading := re.search(r"^# (.+)$", card.text, re.MULTILINE):
        name = re.escape(heading[1].strip())
        text = re.sub(
            rf'from_pretrained\("([^"]*/)?{name}"(, variant="[^"]*")?',
            f'from_pretrained("{repo_id}"{_variant_argument(variant)}',
            card.text,
        )
        card.text = text.replace(heading[0], f"# {repo_id}", 1)
    card.data.license = license or card.data.license
    card.save(folder / "README.md")


def _variant_argument(variant: str | None) -> str:
    """The argument of `from_pretrained` for a variant, in code."""
    return f', variant="{variant}"' if variant else ""


def _add_blocks(pipeline: InstructDiffusionPipeline, folder: Path, variant: str | None, repo_id: str | None) -> None:
    """Copy the file of the blocks into a saved model's folder, and write the two files that ModularPipeline needs."""
    code = Path(modular_instruct_diffusion.__file__)
    shutil.copyfile(code, folder / code.name)
    blocks = InstructDiffusionBlocks()
    blocks.save_pretrained(folder)
    saved = json.loads((folder / pipeline.config_name).read_text(encoding="utf-8"))
    index: dict[str, object] = {"_class_name": "ModularPipeline", "_blocks_class_name": type(blocks).__name__}
    index |= {name: saved[name] for name in ("_diffusers_version", "task_settings")}
    for name in blocks.component_names:
        library, kind = saved.get(name, (None, None))
        if library is not None:
            # Components in the folder need no path, because diffusers finds them in the folder itself.
            source = {} if repo_id is None else {"pretrained_model_name_or_path": repo_id}
            is_model = isinstance(getattr(pipeline, name), torch.nn.Module)
            names = {"subfolder": name, "variant": variant if is_model else None}
            index[name] = [library, kind, {"type_hint": [library, kind], **source, **names}]
    (folder / ModularPipeline.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
