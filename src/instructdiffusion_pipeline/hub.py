"""Write a pipeline as a folder that carries its own code, and put such a folder on the Hub.

`save_pretrained` stores weights and settings; whoever loads them needs this package. What is exported here can also be
loaded with nothing but diffusers: the pipeline's file lies next to the weights, and `model_index.json` names it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from . import pipeline_instruct_diffusion
from .pipeline_instruct_diffusion import InstructDiffusionPipeline

_CODE = Path(pipeline_instruct_diffusion.__file__)

_CARD = """
# {name}

An InstructDiffusion model: it is given a picture and an instruction in words, and its answer is a picture.

With nothing but diffusers; this runs the code in `{code}`, so read that file before you trust it:

```python
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
answer = pipe("make it winter", image=load_image("photo.jpg")).images[0]
```

With the package `instructdiffusion_pipeline`, whose own code is used instead:

```python
from diffusers.utils import load_image
from instructdiffusion_pipeline import InstructDiffusionPipeline

pipe = InstructDiffusionPipeline.from_pretrained("{name}")
answer = pipe("make it winter", image=load_image("photo.jpg")).images[0]
```
"""


def export(pipeline: InstructDiffusionPipeline, path: str | os.PathLike[str], license: str | None = None) -> Path:
    """Write weights, code and model card to a new folder, which appears complete or not at all.

    The folder loads with `InstructDiffusionPipeline.from_pretrained(path)`, and without this package with
    `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)`. The code in it is this package's pipeline file.
    A process that is killed meanwhile leaves a hidden folder `.NAME.*` beside the target, which may be deleted.

    Args:
        pipeline: the pipeline to write, its weights in the precision they have now.
        path: the folder to make; parents that are missing are made too.
        license: the licence of the weights as the Hub spells it (`"mit"`, `"cc-by-4.0"`, ...); none: not stated.

    Returns:
        `path`.

    Raises:
        TypeError: `pipeline` is not an `InstructDiffusionPipeline`.
        ValueError: it holds LoRA layers or an IP-Adapter.
        FileExistsError: there is something at `path` already; it is left as it is.
    """
    _check(pipeline)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"path: {path} already exists; give the name of a folder that is still to be made")
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, so that the last step is a rename and copies no weights.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        staged = Path(scratch, path.name)
        _write(pipeline, staged, path.name, license)
        staged.rename(path)
    return path


def push(
    pipeline: InstructDiffusionPipeline, repo_id: str, private: bool | None = None, license: str | None = None
) -> str:
    """Upload weights, code and model card to a model repository on the Hub, which is created if it is missing.

    Needs a token that may write there (`hf auth login`, or the variable `HF_TOKEN`).

    Args:
        pipeline: the pipeline to upload, its weights in the precision they have now.
        repo_id: `"owner/name"`, or `"name"` for a repository of your own.
        private: for a new repository, whether only its owner sees it; none: the owner's default.
        license: as in `export`; it goes into a new model card. A card that the repository has already is kept.

    Returns:
        The address of the commit.

    Raises:
        TypeError: `pipeline` is not an `InstructDiffusionPipeline`.
        ValueError: it holds LoRA layers or an IP-Adapter.
        huggingface_hub.errors.HFValidationError: `repo_id` is not a name the Hub allows.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; no commit was made.
    """
    _check(pipeline)
    # Asked for first: a bad name or token must show before gigabytes are written.
    repo_id = create_repo(repo_id, private=private, exist_ok=True).repo_id
    kept = ["README.md"] if file_exists(repo_id, "README.md") else None
    with tempfile.TemporaryDirectory() as scratch:
        _write(pipeline, Path(scratch), repo_id, license)
        # Weight files that an earlier push left under other names could be loaded in place of the new ones.
        stale = ["*/*.safetensors", "*/*.safetensors.index.json", "*/*.bin"]
        commit = upload_folder(repo_id=repo_id, folder_path=scratch, ignore_patterns=kept, delete_patterns=stale)
    return commit.commit_url


def find_file(model: str | os.PathLike[str], name: str) -> Path | None:
    """The file `name` of a model's folder or Hub repository, from which it is then fetched.

    None if the model has no such file, or if, offline, the cache has none. Raises a ValueError if `model` is no folder
    and cannot be a repository either.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.exists() else None
    try:
        return Path(hf_hub_download(str(model), name))
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(
            f"`model` must be a folder or a Hub repository; there is no folder {str(model)!r}."
        ) from error


def _check(pipeline: InstructDiffusionPipeline) -> None:
    # By name, because a pipeline that diffusers loaded from an export has the class of that export's file.
    found = type(pipeline).__name__
    if found != InstructDiffusionPipeline.__name__:
        raise TypeError(f"pipeline: expected an {InstructDiffusionPipeline.__name__}, got {found}")
    for component in ("unet", "text_encoder"):
        if getattr(getattr(pipeline, component), "peft_config", None):
            raise ValueError(
                f"pipeline: its {component} holds LoRA layers, which a folder cannot carry; call fuse_lora() if they"
                " are to stay, and unload_lora_weights()"
            )
    if pipeline.unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise ValueError("pipeline: it holds an IP-Adapter, which a folder cannot carry; call unload_ip_adapter()")


def _write(pipeline: InstructDiffusionPipeline, folder: Path, name: str, license: str | None) -> None:
    pipeline.save_pretrained(folder)
    shutil.copyfile(_CODE, folder / _CODE.name)
    for file in (folder / pipeline.config_name, *folder.glob("*/config.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        # Where on this machine the weights came from is not for publication.
        settings.pop("_name_or_path", None)
        if file.parent == folder:
            # The list, [file, class], is what makes diffusers look for the code in the folder itself.
            settings["_class_name"] = [_CODE.stem, InstructDiffusionPipeline.__name__]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    data = ModelCardData(
        license=license, library_name="diffusers", pipeline_tag="image-to-image", tags=["instructdiffusion"]
    )
    ModelCard(f"---\n{data}\n---\n{_CARD.format(name=name, code=_CODE.name)}").save(folder / "README.md")
