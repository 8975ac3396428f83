"""Who can load what: every promise is kept in a fresh process with empty caches, without a network."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import tiny
from hub_server import HubServer, running_hub
from huggingface_hub import ModelCard
from peft import LoraConfig

from instructdiffusion_pipeline import InstructDiffusionPipeline, export, pipeline_instruct_diffusion, push

ROOT = Path(__file__).parent.parent
CODE = "pipeline_instruct_diffusion.py"

PRELUDE = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from diffusers import DiffusionPipeline

def answer(pipe):
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").convert("RGB").resize((16, 16))
    result = pipe("mark the cat", image=picture, num_inference_steps=2, resolution=None,
                  generator=torch.manual_seed(0), output_type="np")
    return result.images.tolist()

def report(**what):
    print("REPORT" + json.dumps(what))
"""
# In such a process the package is as good as not installed.
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
    """Runs code in new interpreters, each with caches of its own and with no network but the Hub it is given."""

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
        """What `script` reports; arguments reach it as `sys.argv[1:]`, and `blocked` takes the package away."""
        code = (BLOCKED if blocked else "") + PRELUDE + dedent(script)
        done = self.run("-c", code, *map(str, arguments), hub=hub)
        found = re.search(r"^REPORT(.*)$", done.stdout, flags=re.MULTILINE)
        assert done.returncode == 0 and found, done.stderr
        return json.loads(found[1])


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model saved and exported, and another one exported."""
    root = tmp_path_factory.mktemp("folders")
    InstructDiffusionPipeline(**tiny.components(seed=0)).save_pretrained(root / "saved")
    export(InstructDiffusionPipeline.from_pretrained(root / "saved"), root / "exported", license="mit")
    export(InstructDiffusionPipeline(**tiny.components(seed=1)), root / "other")
    return root


@pytest.fixture(scope="module")
def reference(root: Path, fresh: Fresh) -> list:
    """What the saved model answers. Loads the export, too, in both ways, and saves and exports it again."""
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, export
    root = Path(sys.argv[1])
    explicit = InstructDiffusionPipeline.from_pretrained(root / "exported")
    own_code = DiffusionPipeline.from_pretrained(root / "exported", trust_remote_code=True)
    for name, pipe in (("explicit", explicit), ("own code", own_code)):
        pipe.save_pretrained(root / f"saved from {name}")
        export(pipe, root / f"exported from {name}")
    saved = InstructDiffusionPipeline.from_pretrained(root / "saved")
    report(answer=answer(saved), same_class=type(own_code) is type(explicit))
    """
    found = fresh.report(script, root)
    assert not found["same_class"]
    return found["answer"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SAVED = ("saved", "saved from explicit", "saved from own code")
EXPORTED = ("exported", "exported from explicit", "exported from own code")


def test_with_the_package_our_class_loads_every_folder_without_trust(root: Path, reference: list, fresh: Fresh):
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline
    answers = {}
    for name in sys.argv[2:]:
        pipe = InstructDiffusionPipeline.from_pretrained(Path(sys.argv[1], name))
        assert type(pipe) is InstructDiffusionPipeline
        answers[name] = answer(pipe)
    report(answers=answers, foreign_code=[name for name in sys.modules if name.startswith("diffusers_modules")])
    """
    found = fresh.report(script, root, *SAVED, *EXPORTED)
    assert found["foreign_code"] == []
    for name, answer in found["answers"].items():
        np.testing.assert_allclose(answer, reference, atol=1e-5, err_msg=name)


def test_with_the_package_diffusers_loads_what_was_saved_without_trust(root: Path, reference: list, fresh: Fresh):
    script = """
    import instructdiffusion_pipeline
    answers = {}
    for name in sys.argv[2:]:
        pipe = DiffusionPipeline.from_pretrained(Path(sys.argv[1], name))
        assert type(pipe) is instructdiffusion_pipeline.InstructDiffusionPipeline
        answers[name] = answer(pipe)
    report(answers=answers)
    """
    for name, answer in fresh.report(script, root, *SAVED)["answers"].items():
        np.testing.assert_allclose(answer, reference, atol=1e-5, err_msg=name)


def test_without_the_package_diffusers_loads_and_runs_what_was_exported(root: Path, reference: list, fresh: Fresh):
    script = """
    from diffusers.utils import HF_MODULES_CACHE
    pipes = {}
    for name in sys.argv[2:]:
        pipes[name] = DiffusionPipeline.from_pretrained(Path(sys.argv[1], name), trust_remote_code=True)
        assert Path(sys.modules[type(pipes[name]).__module__].__file__).is_relative_to(HF_MODULES_CACHE)
    # Only now, when all are loaded: none may have taken another's code or weights.
    answers = {name: answer(pipe) for name, pipe in pipes.items()}
    try:
        DiffusionPipeline.from_pretrained(Path(sys.argv[1], "exported"))
    except ValueError as error:
        report(answers=answers, untrusted=str(error))
    """
    found = fresh.report(script, root, "exported", "other", *EXPORTED[1:], blocked=True)
    assert "trust_remote_code" in found["untrusted"]
    assert not np.allclose(found["answers"].pop("other"), reference, atol=1e-3)
    for name, answer in found["answers"].items():
        np.testing.assert_allclose(answer, reference, atol=1e-5, err_msg=name)


def test_pushed_and_pulled(root: Path, reference: list, fresh: Fresh, hub: HubServer):
    example = str(ROOT / "examples/push_to_hub.py")
    arguments = ("--model", str(root / "saved"), "--repo_id", "me/tiny", "--private", "--license", "cc-by-4.0")
    done = fresh.run(example, *arguments, hub=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/tiny/commit/{hub.commit_hash('me/tiny')}"
    assert hub.private == {"me/tiny": True}
    assert set(hub.files["me/tiny"]) == files(root / "exported")
    weights = [path for path in hub.files["me/tiny"] if path.endswith(".safetensors")]
    assert sum(request.startswith("PUT") for request in hub.requests) == len(weights) == 3
    card = ModelCard(hub.files["me/tiny"]["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert 'DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)' in card.text

    script = 'report(answer=answer(DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)))'
    answer = fresh.report(script, hub=hub, blocked=True)["answer"]
    np.testing.assert_allclose(answer, reference, atol=1e-5)

    hub.files["me/tiny"]["README.md"] = b"written by hand"
    hub.files["me/tiny"]["unet/diffusion_pytorch_model.bin"] = b"of an older push"
    script = """
    from instructdiffusion_pipeline import InstructDiffusionPipeline, push
    pipe = InstructDiffusionPipeline.from_pretrained("me/tiny")
    found = answer(pipe)
    torch.nn.init.zeros_(pipe.unet.conv_in.weight)
    push(pipe, "me/tiny")
    report(answer=found, foreign_code=[name for name in sys.modules if name.startswith("diffusers_modules")])
    """
    weights = "unet/diffusion_pytorch_model.safetensors"
    before = hub.files["me/tiny"][weights]
    found = fresh.report(script, hub=hub)
    assert found["foreign_code"] == []
    np.testing.assert_allclose(found["answer"], reference, atol=1e-5)
    assert hub.files["me/tiny"][weights] != before
    assert hub.files["me/tiny"]["README.md"] == b"written by hand"
    assert set(hub.files["me/tiny"]) == files(root / "exported"), "no stale weights beside the new ones"


def test_presets_and_a_reading_are_looked_for_on_the_hub(fresh: Fresh, hub: HubServer):
    hub.files["me/tiny"] = {"presets.json": b'{"editing": {"guidance_scale": 2.0}}'}
    hub.files["me/bare"] = {"README.md": b"nothing else"}
    script = """
    from instructdiffusion_pipeline import load_presets
    from instructdiffusion_pipeline.readout import LearnedReading
    report(presets=[load_presets("me/tiny"), load_presets("me/bare")], reading=LearnedReading.beside("me/bare"))
    """
    found = fresh.report(script, hub=hub)
    assert found["presets"] == [{"editing": {"guidance_scale": 2.0}}, {}]
    assert found["reading"] is None


def test_an_export_is_a_saved_folder_with_code_and_card(root: Path):
    saved, exported = root / "saved", root / "exported"
    assert files(exported) == files(saved) | {CODE, "README.md"}
    assert (exported / CODE).read_bytes() == Path(pipeline_instruct_diffusion.__file__).read_bytes()
    assert {path.suffix for path in exported.rglob("*model*") if path.is_file()} == {".safetensors", ".json"}
    for weights in saved.rglob("*.safetensors"):
        assert (exported / weights.relative_to(saved)).read_bytes() == weights.read_bytes()

    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_instruct_diffusion", "InstructDiffusionPipeline"]
    assert json.loads((saved / "model_index.json").read_text())["_class_name"] == "InstructDiffusionPipeline"
    card = ModelCard.load(exported / "README.md").data
    assert (card.library_name, card.pipeline_tag, card.license) == ("diffusers", "image-to-image", "mit")


def test_an_export_does_not_say_where_its_weights_came_from(root: Path):
    texts = [path for path in (root / "exported").rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert [path for path in texts if str(root) in path.read_text(encoding="utf-8")] == []


def test_export_leaves_what_is_there_alone(pipe: InstructDiffusionPipeline, tmp_path: Path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=f"path: {re.escape(str(target))} already exists"):
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


def test_a_failed_export_leaves_nothing(
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
def test_another_pipeline_is_refused(write: Callable, tmp_path: Path):
    with pytest.raises(TypeError, match="pipeline: expected an InstructDiffusionPipeline, got str"):
        write("a string", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export, push])
def test_a_pipeline_with_lora_layers_is_refused(pipe: InstructDiffusionPipeline, write: Callable, tmp_path: Path):
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="pipeline: its unet holds LoRA layers"):
        write(pipe, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_adds_one_name_to_diffusers_and_no_more(fresh: Fresh):
    script = """
    import diffusers
    import instructdiffusion_pipeline
    from instructdiffusion_pipeline import hub
    def ours(value):
        return str(getattr(value, "__module__", "")).startswith("instructdiffusion_pipeline")
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
