"""Write a pipeline to a folder together with its code, and push such a folder to the Hub.

`save_pretrained` writes weights and settings; loading them needs this package. `export` and `push` also write the
pipeline's file and name it in `model_index.json`, so that loading needs diffusers alone.
"""

import json
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, model_info, upload_folder

from .files import atomic_write
from .pipeline_instruct_diffusion import InstructDiffusionPipeline, add_code

# The weight files that diffusers and transformers write in a component's folder, sharded or not.
_WEIGHTS = re.compile(r"([^/]+)/(diffusion_)?(pytorch_)?model[.-][^/]*(safetensors|bin|index\.json)")

_CARD = """
# {name}

An InstructDiffusion model. Its inputs are an image and a text instruction; its output is an image.

Load it with diffusers alone. This runs the file `pipeline_instruct_diffusion.py` of this repository, so read that file
before you trust it:

```python
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
answer = pipe("make it winter", load_image("photo.jpg")).images[0]
```

With the package `instructdiffusion_pipeline` installed, its code is used, and `trust_remote_code` is not needed:

```python
from diffusers.utils import load_image
from instructdiffusion_pipeline import InstructDiffusionPipeline

pipe = InstructDiffusionPipeline.from_pretrained("{name}")
answer = pipe("make it winter", load_image("photo.jpg")).images[0]
```
"""


def export(pipeline: InstructDiffusionPipeline, path: str | os.PathLike[str], license: str | None = None) -> Path:
    """Write weights, settings, code and model card to a new folder, atomically.

    The folder loads with `InstructDiffusionPipeline.from_pretrained(path)`, and without this package with
    `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)`. Its code is this package's pipeline file.

    Args:
        pipeline: the pipeline to write; the weights keep their precision.
        path: the new folder. Missing parents are created.
        license: the license of the weights, as the Hub spells it (`"mit"`, `"cc-by-4.0"`, ...), for the model card.

    Returns:
        `path`.

    Raises:
        TypeError: `pipeline` is not an `InstructDiffusionPipeline`.
        ValueError: `pipeline` has LoRA layers or an IP-Adapter.
        FileExistsError: `path` exists; it is not changed.
    """
    _check(pipeline)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"`path` must be a new folder, but {path} already exists.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        _write(pipeline, partial, path.name, license)
    return path


def push(
    pipeline: InstructDiffusionPipeline, repo_id: str, private: bool | None = None, license: str | None = None
) -> str:
    """Upload weights, settings, code and model card to a model repository on the Hub, in one commit.

    A missing repository is created. Needs a token with write access (`hf auth login`, or the variable `HF_TOKEN`).
    If the repository already contains a pipeline, the weight files of its components are replaced. Other
    files are not changed, and neither is an existing model card.

    Args:
        pipeline: the pipeline to upload; the weights keep their precision.
        repo_id: `"owner/name"`, or `"name"` for a repository of your own.
        private: whether a new repository is private. `None` takes the owner's default.
        license: the license of the weights, as the Hub spells it, for a new model card.

    Returns:
        The address of the commit.

    Raises:
        TypeError: `pipeline` is not an `InstructDiffusionPipeline`.
        ValueError: `pipeline` has LoRA layers or an IP-Adapter.
        huggingface_hub.errors.HFValidationError: `repo_id` is not a valid name.
        huggingface_hub.errors.HTTPError: the Hub cannot be reached or rejects the request; no commit was made.
    """
    _check(pipeline)
    # Before the weights are written, so that a bad name or token is reported at once.
    repo_id = create_repo(repo_id, private=private, exist_ok=True).repo_id
    present, weights = _earlier_push(repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        _write(pipeline, Path(scratch), repo_id, license)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=scratch,
            ignore_patterns=["README.md"] if "README.md" in present else None,
            # Weight files with other names (shards, variants, .bin) could be loaded in place of the new ones.
            delete_patterns=weights,
        )
    return commit.commit_url


def _earlier_push(repo_id: str) -> tuple[set[str], list[str]]:
    """All files of a repository, and those of them that are weights of the pipeline in its `model_index.json`."""
    info = model_info(repo_id)
    present = {file.rfilename for file in info.siblings or []}
    name = InstructDiffusionPipeline.config_name
    if name not in present:
        return present, []
    index = json.loads(Path(hf_hub_download(repo_id, name, revision=info.sha)).read_text(encoding="utf-8"))
    # A component's entry is [library, class], or [null, null] if the pipeline has none.
    components = {key for key, value in index.items() if key[0] != "_" and isinstance(value, list) and value[0]}
    matches = map(_WEIGHTS.fullmatch, sorted(present))
    return present, [match[0] for match in matches if match and match[1] in components]


def _check(pipeline: InstructDiffusionPipeline) -> None:
    # By name: a pipeline loaded with `trust_remote_code=True` has the class of its folder's file.
    found = type(pipeline).__name__
    if found != InstructDiffusionPipeline.__name__:
        raise TypeError(f"`pipeline` must be an {InstructDiffusionPipeline.__name__}; got {found}.")
    for component in ("unet", "text_encoder"):
        if getattr(getattr(pipeline, component), "peft_config", None):
            raise ValueError(
                f"`pipeline` must not have LoRA layers, but its {component} has. Call fuse_lora() to keep their"
                " effect, then unload_lora_weights()."
            )
    if pipeline.unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise ValueError("`pipeline` must not have an IP-Adapter. Call unload_ip_adapter() first.")


def _write(pipeline: InstructDiffusionPipeline, folder: Path, name: str, license: str | None) -> None:
    pipeline.save_pretrained(folder)
    add_code(folder)
    for file in (folder / pipeline.config_name, *folder.glob("*/config.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        # The path on this machine that the weights were loaded from.
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    data = ModelCardData(
        license=license, library_name="diffusers", pipeline_tag="image-to-image", tags=["instructdiffusion"]
    )
    ModelCard(f"---\n{data}\n---\n{_CARD.format(name=name)}").save(folder / "README.md")
