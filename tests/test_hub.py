"""All ways to save, push and load a model, each in a new process with empty caches and without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
from diffusers import DiffusionPipeline, ModularPipeline, UNet2DModel
from hub_server import HubServer, running_hub
from huggingface_hub import ModelCard
from peft import LoraConfig

from instructdiffusion_pipeline import (
    InstructDiffusionPipeline,
    export,
    modular_instruct_diffusion,
    pipeline_instruct_diffusion,
    push,
)

ROOT = Path(__file__).parent.parent
CODE = "pipeline_instruct_diffusion.py"
BLOCKS = {"modular_instruct_diffusion.py", "modular_config.json", "modular_model_index.json"}
PUSH_TO_HUB = str(ROOT / "examples/push_to_hub.py")

TASK_SETTINGS = {"editing": {"num_inference_steps": 2, "guidance_scale": 3.5}, "segmentation": {"guidance_scale": 1}}

PRELUDE = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from diffusers import DiffusionPipeline

def answer(pipe):
    # An answer with the model's own settings, and an output of its readout.
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").convert("RGB").resize((16, 16))
    result = pipe("mark the cat", picture, resolution=0, generator=torch.manual_seed(0), output_type="np")
    with torch.no_grad():
        read = pipe.readout(torch.ones(1, 3, 8, 8, dtype=pipe.readout.dtype), 0).sample
    return [*result.images.flatten().tolist(), *read.flatten().tolist()]

def report(**what):
    print("REPORT" + json.dumps(what))
"""
# Makes the package impossible to import, as if it were not installed.
BLOCKED = """
import sys
sys.modules["instructdiffusion_pipeline"] = None
try:
    import instructdiffusion_pipeline
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can still be imported")
"""


class Fresh:
    """Runs code in new interpreters, each with its own caches and with no network except the given Hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def run(self, *command: str, hub: HubServer | None = None) -> subprocess.CompletedProcess[str]:
        self.count += 1
        home = self.folder / f"home{self.count}"
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {
            "HF_HOME": str(home / "hf"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_OFFLINE": "0" if hub else "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        if hub:
            environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_the_test"}
        return subprocess.run(
            [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, timeout=300
        )

    def report(self, script: str, *arguments: object, hub: HubServer | None = None, blocked: bool = False) -> dict:
        """Run `script` with `arguments`, and return its report. `blocked` makes the package impossible to import."""
        code = (BLOCKED if blocked else "") + PRELUDE + dedent(script)
        done = self.run("-c", code, *map(str, arguments), hub=hub)
        found = re.search(r"^REPORT(.*)$", done.stdout, flags=re.MULTILINE)
        assert done.returncode == 0 and found, done.stderr
        return json.loads(found[1])


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("processes"))


def model(seed: int) -> InstructDiffusionPipeline:
    components = tiny.components(seed)
    readout = UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1
    )
    return InstructDiffusionPipeline(**components, readout=readout.eval(), task_settings=TASK_SETTINGS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model with settings and a readout, saved and exported, and another one exported."""
    root = tmp_path_factory.mktemp("folders")
    model(seed=0).save_pretrained(root / "saved")
    export(InstructDiffusionPipeline.from_pretrained(root / "saved"), root / "exported", license="mit")
    export(model(seed=1), root / "other")
    return root


@pytest.fixture(scope="module")
def reference(root: Path, fresh: Fresh) -> list:
    """The output of the saved model. Also loads the export in both ways, and saves and exports it again."""
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, export
    root = Path(sys.argv[1])
    explicit = InstructDiffusionPipeline.from_pretrained(root / "exported")
    own_code = DiffusionPipeline.from_pretrained(root / "exported", trust_remote_code=True)
    for name, pipe in (("explicit", explicit), ("own code", own_code)):
        pipe.save_pretrained(root / f"saved from {name}")
        export(pipe, root / f"exported from {name}")
    saved = InstructDiffusionPipeline.from_pretrained(root / "saved")
    assert type(own_code) is not type(explicit)
    report(answer=answer(saved), settings=saved.config.task_settings)
    """
    found = fresh.report(script, root)
    assert found["settings"] == TASK_SETTINGS
    return found["answer"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


MODULAR_ANSWER = """
from diffusers import ModularPipeline

def modular_answer(source, variant=None, dtype=torch.float32, **options):
    # Whether the blocks give the image of the pipeline, and the sum of its values.
    blocks = ModularPipeline.from_pretrained(source, trust_remote_code=True, **options)
    blocks.load_components(dtype=dtype, **options)
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, variant=variant, dtype=dtype, **options)
    for each in (blocks, pipe):
        each.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").convert("RGB").resize((16, 16))
    call = {"prompt": "mark the cat", "image": picture, "resolution": 0, "output_type": "np"}
    images = blocks(**call, generator=torch.manual_seed(0), output="images")
    same = pipe(**call, generator=torch.manual_seed(0)).images
    return {"equal": bool((images == same).all()), "class": type(blocks).__name__, "sum": float(images.sum())}
"""


def test_without_the_package_diffusers_loads_the_blocks(root: Path, fresh: Fresh):
    script = """
    refused = None
    try:
        ModularPipeline.from_pretrained(str(Path(sys.argv[1], "exported")))
    except ValueError as error:
        refused = str(error)
    # Two models in one process, to see that none takes the other's weights or settings.
    report(refused=refused, found=[modular_answer(Path(sys.argv[1], name)) for name in ("exported", "other")])
    """
    found = fresh.report(MODULAR_ANSWER + dedent(script), root, blocked=True)
    assert "trust_remote_code=True" in found["refused"]
    assert all(answer["equal"] and answer["class"] == "ModularPipeline" for answer in found["found"])
    assert found["found"][0]["sum"] != found["found"][1]["sum"]


@pytest.mark.slow  # many seconds, most of them in new processes
def test_blocks_load_from_the_hub_and_from_a_copy_of_the_repository(root: Path, fresh: Fresh, hub: HubServer):
    fresh.report(PUSH, root / "saved", hub=hub)
    script = """
    from huggingface_hub import snapshot_download
    copy = snapshot_download("me/tiny", local_dir="copy")
    report(found=[modular_answer("me/tiny"), modular_answer(copy)])
    """
    for answer in fresh.report(MODULAR_ANSWER + dedent(script), hub=hub, blocked=True)["found"]:
        assert answer["equal"] and answer["class"] == "ModularPipeline"


WITHOUT_CODE = ("saved", "saved from explicit")
WITH_CODE = ("exported", "exported from explicit", "exported from own code", "saved from own code")


def test_with_the_package_our_class_loads_all_folders_without_trust(root: Path, reference: list, fresh: Fresh):
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline
    answers = {}
    for name in sys.argv[2:]:
        pipe = InstructDiffusionPipeline.from_pretrained(Path(sys.argv[1], name))
        assert type(pipe) is InstructDiffusionPipeline
        answers[name] = answer(pipe)
    report(answers=answers, foreign_code=[name for name in sys.modules if name.startswith("diffusers_modules")])
    """
    found = fresh.report(script, root, *WITHOUT_CODE, *WITH_CODE)
    assert found["foreign_code"] == []
    for name, answer in found["answers"].items():
        np.testing.assert_allclose(answer, reference, atol=1e-5, err_msg=name)


def test_with_the_package_diffusers_loads_what_it_saved_without_trust(root: Path, reference: list, fresh: Fresh):
    script = """
    import instructdiffusion_pipeline
    answers = {}
    for name in sys.argv[2:]:
        pipe = DiffusionPipeline.from_pretrained(Path(sys.argv[1], name))
        assert type(pipe) is instructdiffusion_pipeline.InstructDiffusionPipeline
        answers[name] = answer(pipe)
    report(answers=answers)
    """
    for name, answer in fresh.report(script, root, *WITHOUT_CODE)["answers"].items():
        np.testing.assert_allclose(answer, reference, atol=1e-5, err_msg=name)


def test_without_the_package_diffusers_loads_all_folders_with_code(root: Path, reference: list, fresh: Fresh):
    script = """
    from diffusers.utils import HF_MODULES_CACHE
    pipes = {}
    for name in sys.argv[2:]:
        pipes[name] = DiffusionPipeline.from_pretrained(Path(sys.argv[1], name), trust_remote_code=True)
        assert Path(sys.modules[type(pipes[name]).__module__].__file__).is_relative_to(HF_MODULES_CACHE)
    # After all are loaded, to see that none took another's code or weights.
    answers = {name: answer(pipe) for name, pipe in pipes.items()}
    try:
        DiffusionPipeline.from_pretrained(Path(sys.argv[1], "exported"))
    except ValueError as error:
        report(answers=answers, untrusted=str(error))
    """
    found = fresh.report(script, root, "other", *WITH_CODE, blocked=True)
    assert "trust_remote_code" in found["untrusted"]
    assert not np.allclose(found["answers"].pop("other"), reference, atol=1e-3)
    for name, answer in found["answers"].items():
        np.testing.assert_allclose(answer, reference, atol=1e-5, err_msg=name)


@pytest.mark.slow  # many seconds, most of them in new processes
def test_saved_and_pushed_again_without_the_package(root: Path, reference: list, fresh: Fresh, hub: HubServer):
    script = """
    from pathlib import Path
    pipe = DiffusionPipeline.from_pretrained(Path(sys.argv[1], "exported"), trust_remote_code=True)
    pipe.save_pretrained(Path(sys.argv[1], "again"))
    pipe.save_pretrained("again", push_to_hub=True, repo_id="me/saved")
    pipe.push_to_hub("me/pushed")
    report()
    """
    fresh.report(script, root, hub=hub, blocked=True)
    assert files(root / "again") == files(root / "saved") | {CODE}
    for repository in ("me/saved", "me/pushed"):
        # diffusers copies the code of the blocks only when they are loaded, so it cannot be saved again.
        assert set(hub.files[repository]) == files(root / "exported") - BLOCKS

    script = """
    pipes = [DiffusionPipeline.from_pretrained(name, trust_remote_code=True) for name in sys.argv[1:]]
    pipes[1].save_pretrained("third time")
    pipes.append(DiffusionPipeline.from_pretrained("third time", trust_remote_code=True))
    report(answers=[answer(pipe) for pipe in pipes])
    """
    for answer in fresh.report(script, root / "again", "me/saved", "me/pushed", hub=hub, blocked=True)["answers"]:
        np.testing.assert_allclose(answer, reference, atol=1e-5)


def test_pushed_and_loaded_by_id_in_three_ways(root: Path, reference: list, fresh: Fresh, hub: HubServer):
    arguments = ("--model", str(root / "saved"), "--repo_id", "me/tiny", "--private", "--license", "cc-by-4.0")
    done = fresh.run(PUSH_TO_HUB, *arguments, hub=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/tiny/commit/{hub.commit_hash('me/tiny')}"
    assert hub.private == {"me/tiny": True}
    assert set(hub.files["me/tiny"]) == files(root / "exported")
    weights = [path for path in hub.files["me/tiny"] if path.endswith(".safetensors")]
    assert sum(request.startswith("PUT") for request in hub.requests) == len(weights) == 4
    assert ModelCard(hub.files["me/tiny"]["README.md"].decode()).data.license == "cc-by-4.0"

    # The second way is for folders written by `save_pretrained`.
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline
    pipe = InstructDiffusionPipeline.from_pretrained("me/tiny")
    assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
    pipe.push_to_hub("me/saved")
    report(answer=answer(pipe), settings=pipe.config.task_settings)
    """
    explicit = fresh.report(script, hub=hub)
    assert CODE not in hub.files["me/saved"]
    script = """
    import instructdiffusion_pipeline
    pipe = DiffusionPipeline.from_pretrained("me/saved")
    assert type(pipe) is instructdiffusion_pipeline.InstructDiffusionPipeline
    report(answer=answer(pipe), settings=pipe.config.task_settings)
    """
    imported = fresh.report(script, hub=hub)
    script = """
    pipe = DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)
    report(answer=answer(pipe), settings=pipe.config.task_settings)
    """
    trusted = fresh.report(script, hub=hub, blocked=True)
    for found in (explicit, imported, trusted):
        assert found["settings"] == TASK_SETTINGS
        np.testing.assert_allclose(found["answer"], reference, atol=1e-5)


def test_the_examples_of_a_model_card_run(root: Path, fresh: Fresh, hub: HubServer):
    hub.files["me/tiny"] = {path: (root / "exported" / path).read_bytes() for path in files(root / "exported")}
    # The card of an export contains the name of its folder.
    card = hub.files["me/tiny"]["README.md"].decode().replace('"exported"', '"me/tiny"')
    alone, with_package = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    picture = 'Image.new("RGB", (32, 32)).save("photo.jpg")\n'
    end = "report(size=answer.size)"
    assert fresh.report(picture + alone + end, hub=hub, blocked=True) == {"size": [32, 32]}
    assert fresh.report(picture + with_package + end, hub=hub) == {"size": [32, 32]}


PUSH = """
from instructdiffusion_pipeline import InstructDiffusionPipeline, push
push(InstructDiffusionPipeline.from_pretrained(sys.argv[1]), "me/tiny")
report()
"""


def test_push_replaces_the_weights_of_an_earlier_push_and_no_other_file(root: Path, fresh: Fresh, hub: HubServer):
    index = {"_class_name": ["lora", "x"], "unet": ["diffusers", "UNet2DConditionModel"], "controlnet": [None, None]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "upscaler": ["diffusers", "UNet2DModel"]}
    others = {
        "README.md": b"written by hand",
        "adapter.safetensors": b"a file at the top",
        "lora/model.safetensors": b"a folder that is no component",
        "controlnet/diffusion_pytorch_model.safetensors": b"a component that the earlier pipeline did not have",
        "unet/pytorch_lora_weights.safetensors": b"another file in the folder of a component",
        "unet/first/diffusion_pytorch_model.safetensors": b"a folder in the folder of a component",
        "vae/diffusion_pytorch_model.bin": b"the earlier pipeline names no vae",
    }
    stale = (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "upscaler/diffusion_pytorch_model.safetensors",
    )
    weights = "unet/diffusion_pytorch_model.safetensors"
    hub.files["me/tiny"] = others | dict.fromkeys((*stale, weights), b"earlier")
    hub.files["me/tiny"]["model_index.json"] = json.dumps(index).encode()
    fresh.report(PUSH, root / "saved", hub=hub)
    found = hub.files["me/tiny"]
    assert set(found) == files(root / "exported") | set(others)
    assert {path: found[path] for path in others} == others
    assert found[weights] == (root / "saved" / weights).read_bytes()


def test_push_deletes_nothing_where_no_pipeline_was(root: Path, fresh: Fresh, hub: HubServer):
    others = {"unet/diffusion_pytorch_model.bin": b"a", "lora/pytorch_lora_weights.safetensors": b"b"}
    hub.files["me/tiny"] = dict(others)
    fresh.report(PUSH, root / "saved", hub=hub)
    assert set(hub.files["me/tiny"]) == files(root / "exported") | set(others)


@pytest.mark.parametrize("lost", ["GET /api/models/me/tiny", "HEAD /me/tiny/resolve"])
def test_a_repository_that_cannot_be_read_raises_an_error(root: Path, fresh: Fresh, hub: HubServer, lost: str):
    hub.files["me/tiny"] = before = {"README.md": b"mine", "model_index.json": b'{"unet": ["diffusers", "x"]}'}
    hub.refused = lost
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    try:
        push(InstructDiffusionPipeline.from_pretrained(sys.argv[1]), "me/tiny")
    except Exception as error:
        report(error=str(error.__cause__ or error))
    """
    assert "403" in fresh.report(script, root / "saved", hub=hub)["error"]
    assert hub.files["me/tiny"] == before


def test_a_hub_that_cannot_be_reached_is_reported(root: Path, fresh: Fresh):
    with running_hub() as closed:
        pass
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1])
    ways = (
        lambda: InstructDiffusionPipeline.from_pretrained("me/tiny"),
        lambda: DiffusionPipeline.from_pretrained("me/tiny"),
        lambda: DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True),
        lambda: push(pipe, "me/tiny"),
        lambda: pipe.push_to_hub("me/tiny"),
    )
    errors = []
    for way in ways:
        try:
            way()
        except Exception as error:
            errors.append(str(error.__cause__ or error))
    report(errors=errors)
    """
    errors = fresh.report(script, root / "saved", hub=closed)["errors"]
    assert len(errors) == 5
    assert all("Connection refused" in error for error in errors), errors


def test_push_to_hub_ends_with_a_one_line_message_and_an_exit_status(root: Path, fresh: Fresh, tmp_path: Path):
    with running_hub() as closed:
        pass
    saved = str(root / "saved")
    for model, repository, status, words in (
        (str(tmp_path), "me/tiny", 2, "--model: must be the folder of a pipeline"),
        (saved, "a/b/c", 2, "--repo_id: "),
        (saved, "me/tiny", 1, "Connection refused"),
    ):
        done = fresh.run(PUSH_TO_HUB, "--model", model, "--repo_id", repository, hub=closed)
        assert done.returncode == status, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr and done.stdout == ""


def test_push_to_hub_uploads_the_card_of_the_model_and_what_it_shows(
    root: Path, fresh: Fresh, hub: HubServer, tmp_path: Path
):
    model = shutil.copytree(root / "exported", tmp_path / "moved")
    card = (model / "README.md").read_text().replace("---\n", "---\nlicense: mit\n", 1)
    card += '\n![Validation](validation.png)\nAutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")\n'
    (model / "README.md").write_text(card)
    for name in ("validation.png", "LICENSE"):
        (model / name).write_bytes(b"of the model")
    hub.files["me/tiny"] = {"LICENSE": b"of the repository"}
    others = {".note.md", "state.pth", "id_rsa"}
    for name in others:
        (model / name).write_bytes(b"not shown by the card")
    done = fresh.run(PUSH_TO_HUB, "--model", str(model), "--repo_id", "me/tiny", "--license", "cc-by-4.0", hub=hub)
    assert done.returncode == 0, done.stderr
    pushed = hub.files["me/tiny"]
    assert pushed.keys() == files(model) - others and pushed["validation.png"] == b"of the model"
    assert pushed["LICENSE"] == b"of the repository"
    found = ModelCard(pushed["README.md"].decode())
    expected = card.replace("# exported", "# me/tiny").replace('"exported"', '"me/tiny"')
    assert found.text == ModelCard(expected).text and 'from_pretrained("me/tiny", trust' in found.text
    assert found.data.to_dict() == ModelCard(card).data.to_dict() | {"license": "cc-by-4.0"}


def test_a_folder_without_a_card_raises_an_error_before_a_request(pipe: InstructDiffusionPipeline, tmp_path: Path):
    with pytest.raises(ValueError, match=f"`card_folder` must be a folder with a README.md; got {tmp_path}"):
        push(pipe, "me/tiny", card_folder=tmp_path)


def test_push_to_hub_of_diffusers_refuses_a_repository_with_blocks(root: Path, fresh: Fresh, hub: HubServer):
    fresh.report(PUSH, root / "saved", hub=hub)
    before = dict(hub.files["me/tiny"])
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1])
    refused = []
    for write in (lambda: pipe.push_to_hub("me/tiny"),
                  lambda: pipe.save_pretrained("copy", push_to_hub=True, repo_id="me/tiny")):
        try:
            write()
        except FileExistsError as error:
            refused.append(str(error))
    pipe.push_to_hub("me/plain")
    pipe.push_to_hub("me/tiny", subfolder="v2")
    report(refused=refused)
    """
    refused = fresh.report(script, root / "saved", hub=hub)["refused"]
    assert len(refused) == 2 and all("me/tiny must not have modular_model_index.json" in each for each in refused)
    assert before.items() <= hub.files["me/tiny"].items() and "model_index.json" in hub.files["me/plain"]
    assert {path.split("/")[0] for path in hub.files["me/tiny"].keys() - before.keys()} == {"v2"}


@pytest.mark.slow  # many seconds, most of them in new processes
def test_push_to_hub_in_half_precision(root: Path, fresh: Fresh, hub: HubServer):
    done = fresh.run(PUSH_TO_HUB, "--model", str(root / "saved"), "--repo_id", "me/tiny", "--half", hub=hub)
    assert done.returncode == 0, done.stderr
    for path, content in hub.files["me/tiny"].items():
        if path.endswith(".safetensors"):
            assert {str(weight.dtype) for weight in safetensors.numpy.load(content).values()} == {"float16"}, path


def test_pix2pix_loads_a_saved_folder_with_a_warning_but_no_exported_one(root: Path, reference: list, fresh: Fresh):
    script = """
    import logging.handlers
    from diffusers import StableDiffusionInstructPix2PixPipeline as Pix2Pix
    log = logging.handlers.BufferingHandler(1000)
    log.setLevel(logging.WARNING)
    logging.getLogger("diffusers").addHandler(log)
    saved = Pix2Pix.from_pretrained(Path(sys.argv[1], "saved"))
    warned = [record.getMessage() for record in log.buffer]
    try:
        Pix2Pix.from_pretrained(Path(sys.argv[1], "exported"))
    except ValueError as error:
        refused = str(error)
    trusted = Pix2Pix.from_pretrained(Path(sys.argv[1], "exported"), trust_remote_code=True)
    report(saved=type(saved).__name__, kept=[name for name in ("readout", "task_settings") if name in saved.config],
           warned=warned, refused=refused, trusted=type(trusted).__name__, answer=answer(trusted))
    """
    found = fresh.report(script, root, blocked=True)
    assert found["saved"] == "StableDiffusionInstructPix2PixPipeline"
    assert found["kept"] == []
    assert any("'readout'" in text and "'task_settings'" in text and "ignored" in text for text in found["warned"])
    assert "trust_remote_code=True" in found["refused"]
    assert found["trusted"] == "InstructDiffusionPipeline"
    np.testing.assert_allclose(found["answer"], reference, atol=1e-5)


def test_an_export_is_a_saved_folder_with_code_and_card(root: Path):
    saved, exported = root / "saved", root / "exported"
    assert files(exported) == files(saved) | {CODE, "README.md"} | BLOCKS
    for module in (pipeline_instruct_diffusion, modular_instruct_diffusion):
        assert (exported / Path(module.__file__).name).read_bytes() == Path(module.__file__).read_bytes()
    assert {path.suffix for path in exported.rglob("*model*") if path.is_file()} == {".safetensors", ".json"}
    for weights in saved.rglob("*.safetensors"):
        assert (exported / weights.relative_to(saved)).read_bytes() == weights.read_bytes()

    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_instruct_diffusion", "InstructDiffusionPipeline"]
    assert json.loads((saved / "model_index.json").read_text())["_class_name"] == "InstructDiffusionPipeline"
    card = ModelCard.load(exported / "README.md").data
    assert (card.library_name, card.pipeline_tag, card.license) == ("diffusers", "image-to-image", "mit")


def test_an_export_does_not_contain_the_path_of_its_source(root: Path):
    texts = [path for path in (root / "exported").rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert [path for path in texts if str(root) in path.read_text(encoding="utf-8")] == []


def test_export_does_not_change_an_existing_folder(pipe: InstructDiffusionPipeline, tmp_path: Path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=f"`path` must be .*{re.escape(str(target))} already exists"):
        export(pipe, target)
    assert files(tmp_path) == {"model/notes"}


def test_export_writes_the_weights_once(
    pipe: InstructDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save, written = pipe.unet.save_pretrained, []

    def watched(folder: str, **options: object) -> None:
        save(folder, **options)
        written.extend(path.stat().st_ino for path in Path(folder).glob("*.safetensors"))

    monkeypatch.setattr(pipe.unet, "save_pretrained", watched)
    export(pipe, tmp_path / "new" / "model")
    assert [path.stat().st_ino for path in (tmp_path / "new/model/unet").glob("*.safetensors")] == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_failed_export_leaves_no_files(
    pipe: InstructDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pipe, "save_config", full)
    with pytest.raises(OSError, match="no space left"):
        export(pipe, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_folder_of_that_name(root: Path, tmp_path: Path, fresh: Fresh):
    script = """
    import os, signal
    from instructdiffusion_pipeline import InstructDiffusionPipeline, export
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1])
    # The settings are written last, after all weights.
    pipe.save_config = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    export(pipe, sys.argv[2])
    """
    done = fresh.run("-c", PRELUDE + dedent(script), str(root / "saved"), str(tmp_path / "model"))
    assert done.returncode == -9
    assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for path in files(tmp_path))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("write", [export, push])
def test_another_pipeline_raises_an_error(write: Callable, tmp_path: Path):
    with pytest.raises(TypeError, match="`pipeline` must be an InstructDiffusionPipeline; got str"):
        write("a string", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export, push])
def test_a_pipeline_with_lora_layers_raises_an_error(pipe: InstructDiffusionPipeline, write: Callable, tmp_path: Path):
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="The pipeline must not have LoRA layers, but its unet has"):
        write(pipe, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_adds_one_name_to_diffusers_and_no_more(fresh: Fresh):
    script = """
    import types
    import diffusers
    import instructdiffusion_pipeline
    from instructdiffusion_pipeline import hub
    def ours(value):  # lazy objects of transformers import what they stand for
        known = isinstance(value, (type, types.FunctionType))
        return known and value.__module__.startswith("instructdiffusion_pipeline")
    found = []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("diffusers", "transformers", "huggingface_hub"):
            for key, value in list(vars(module).items()):
                found += [f"{name}.{key}"] if ours(value) else []
                if isinstance(value, type) and not ours(value):
                    found += [f"{name}.{key}.{attribute}" for attribute, it in list(vars(value).items()) if ours(it)]
    report(found=found, same=diffusers.InstructDiffusionPipeline is hub.InstructDiffusionPipeline)
    """
    assert fresh.report(script) == {"found": ["diffusers.InstructDiffusionPipeline"], "same": True}


# --- variant, token, revision, message, pull request ----------------------------------------------------------------


def test_a_variant_is_exported_and_loaded_in_all_ways(fresh: Fresh, tmp_path: Path):
    export(model(seed=0).to(torch.float16), tmp_path / "half", variant="fp16")
    weights = [path for path in files(tmp_path / "half") if path.endswith(".safetensors")]
    assert len(weights) == 4 and all(".fp16." in path for path in weights)
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1], variant="fp16", dtype=torch.float16)
    report(dtype=str(pipe.unet.dtype))
    """
    assert fresh.report(script, tmp_path / "half") == {"dtype": "torch.float16"}
    script = """
    found = modular_answer(sys.argv[1], variant="fp16", dtype=torch.float16)
    try:
        DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
    except OSError as error:
        report(equal=found["equal"], refused=str(error))
    """
    card = (tmp_path / "half" / "README.md").read_text()
    for end in (", trust_remote_code=True)", ")"):
        assert f'from_pretrained("half", variant="fp16"{end}' in card
    found = fresh.report(MODULAR_ANSWER + dedent(script), tmp_path / "half", blocked=True)
    assert found["equal"] and "no file named" in found["refused"]


@pytest.mark.slow  # many seconds, most of them in new processes
def test_a_variant_is_pushed_beside_other_weights(root: Path, fresh: Fresh, hub: HubServer):
    fresh.report(PUSH, root / "saved", hub=hub)
    shard = "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"
    index = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": shard}}).encode()
    other = "vae/diffusion_pytorch_model.safetensors.index.bf16.json"
    hub.files["me/tiny"] |= {
        f"unet/{shard}": b"stale",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json": index,
        other: b"of another variant",
    }
    before = {path: data for path, data in hub.files["me/tiny"].items() if path.endswith(".safetensors")}
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float16)
    push(pipe, "me/tiny", variant="fp16")
    both = {}
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        loaded = InstructDiffusionPipeline.from_pretrained("me/tiny", variant=variant, dtype=dtype)
        both[str(variant)] = answer(loaded)
    report(**both)
    """
    found = fresh.report(script, root / "saved", hub=hub)
    after = {path: data for path, data in hub.files["me/tiny"].items() if path.endswith(".safetensors")}
    del before[f"unet/{shard}"]
    assert [path for path in hub.files["me/tiny"] if ".index." in path] == [other]
    assert {path: after.pop(path) for path in before} == before
    assert len(after) == 4 and all(".fp16." in path for path in after)
    np.testing.assert_allclose(found["fp16"], found["None"], atol=0.05)
    assert found["fp16"] != found["None"]


@pytest.mark.slow  # many seconds, most of them in new processes
def test_a_given_token_is_used_instead_of_the_saved_one(root: Path, reference: list, fresh: Fresh, hub: HubServer):
    hub.token = "hf_given"
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1])
    for _ in range(2):  # the second replaces the files of the first
        push(pipe, "me/tiny", token="hf_given")
    refused = []
    for way in (
        lambda: push(pipe, "me/tiny"),
        lambda: InstructDiffusionPipeline.from_pretrained("me/tiny"),
        lambda: DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True),
    ):
        try:
            way()
        except Exception as error:
            refused.append(str(error.__cause__ or error))
    loaded = InstructDiffusionPipeline.from_pretrained("me/tiny", token="hf_given")
    report(refused=refused, answer=answer(loaded))
    """
    found = fresh.report(script, root / "saved", hub=hub)
    assert len(found["refused"]) == 3 and all("401" in text for text in found["refused"]), found["refused"]
    np.testing.assert_allclose(found["answer"], reference, atol=1e-5)
    script = """
    from diffusers import ModularPipeline
    blocks = ModularPipeline.from_pretrained("me/tiny", trust_remote_code=True, token="hf_given")
    blocks.load_components(token="hf_given")
    try:
        # diffusers 0.42 does not send the token when it asks for the commit of the code.
        DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True, token="hf_given")
    except Exception as error:
        report(missing=blocks.null_component_names, refused=str(error))
    """
    found = fresh.report(script, hub=hub, blocked=True)
    assert found["missing"] == ["safety_checker", "feature_extractor"] and "401" in found["refused"]


@pytest.mark.slow  # many seconds, most of them in new processes
def test_a_commit_has_its_message_and_branch(root: Path, fresh: Fresh, hub: HubServer):
    hub.files["me/tiny"] = {"README.md": b"main"}
    hub.revisions["me/tiny", "dev"] = {"README.md": b"dev"}
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    pipe = InstructDiffusionPipeline.from_pretrained(sys.argv[1])
    url = push(pipe, "me/tiny", revision="dev", commit_message="Add the model")
    try:
        push(pipe, "me/tiny", revision="none")
    except Exception as error:
        report(url=url, refused=type(error).__name__)
    """
    found = fresh.report(script, root / "saved", hub=hub)
    assert found["refused"] == "RevisionNotFoundError"
    assert hub.messages == ["Add the model"]
    assert hub.files["me/tiny"] == {"README.md": b"main"}
    assert hub.revisions["me/tiny", "dev"]["README.md"] == b"dev"
    assert set(hub.revisions["me/tiny", "dev"]) == files(root / "exported")
    assert found["url"].endswith(hub.commit_hash("me/tiny", "dev"))


@pytest.mark.slow  # many seconds, most of them in new processes
def test_a_pull_request_does_not_change_the_branch(root: Path, fresh: Fresh, hub: HubServer):
    hub.files["me/tiny"] = {"README.md": b"main"}
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    report(url=push(InstructDiffusionPipeline.from_pretrained(sys.argv[1]), "me/tiny", create_pr=True))
    """
    assert fresh.report(script, root / "saved", hub=hub)["url"] == f"{hub.url}/me/tiny/discussions/1"
    assert hub.files["me/tiny"] == {"README.md": b"main"}
    assert set(hub.revisions["me/tiny", "refs/pr/1"]) == files(root / "exported")


def test_a_revision_is_loaded_in_all_ways(root: Path, reference: list, fresh: Fresh, hub: HubServer):
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    first, second = (InstructDiffusionPipeline.from_pretrained(Path(sys.argv[1], name)) for name in ("saved", "other"))
    commit = push(first, "me/tiny").split("/")[-1]
    push(second, "me/tiny")
    old, new = (InstructDiffusionPipeline.from_pretrained("me/tiny", revision=name) for name in (commit, "main"))
    report(commit=commit, old=answer(old), new=answer(new))
    """
    found = fresh.report(script, root, hub=hub)
    np.testing.assert_allclose(found["old"], reference, atol=1e-5)
    assert not np.allclose(found["new"], reference, atol=1e-3)
    script = """
    pipe = DiffusionPipeline.from_pretrained("me/tiny", revision=sys.argv[1], trust_remote_code=True)
    report(answer=answer(pipe), modular=modular_answer("me/tiny", revision=sys.argv[1]))
    """
    trusted = fresh.report(MODULAR_ANSWER + dedent(script), found["commit"], hub=hub, blocked=True)
    np.testing.assert_allclose(trusted["answer"], reference, atol=1e-5)
    assert trusted["modular"]["equal"]


def test_half_precision_is_loaded_in_float32_unless_told(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    """transformers alone would load the text encoder in the precision of its file."""
    export(pipe.to(torch.float16), tmp_path / "exported")
    pipe.save_pretrained(tmp_path / "saved")
    blocks = ModularPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    blocks.load_components()
    loaded = [
        InstructDiffusionPipeline.from_pretrained(tmp_path / "exported"),
        InstructDiffusionPipeline.from_pretrained(tmp_path / "saved"),
        DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True),
        blocks,
    ]
    for each in loaded:
        assert {part.dtype for part in (each.unet, each.vae, each.text_encoder)} == {torch.float32}
    half = InstructDiffusionPipeline.from_pretrained(tmp_path / "exported", torch_dtype=torch.float16)
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.float16}
