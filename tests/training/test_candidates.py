import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from instructdiffusion_pipeline.datasets.preferences import load_preferences
from instructdiffusion_pipeline.training.candidates import GUIDANCE_GRID, make_candidates
from instructdiffusion_pipeline.types import Sample

SAMPLES = [Sample(tiny.picture(seed=i), tiny.picture(seed=50 + i), f"paint {i}") for i in range(3)]
SMALL = {"grid": [(1.5, 1.0), (3.0, 1.25)], "num_inference_steps": 2, "batch_size": 2}


def test_there_is_a_candidate_for_each_sample_and_setting(pipe, tmp_path):
    make_candidates(pipe, SAMPLES, tmp_path, **SMALL)
    names = sorted(path.name for path in (tmp_path / "candidates").iterdir())
    assert names == [f"00000{i}_{k}.png" for i in range(3) for k in ("00_s1.5_i1", "01_s3_i1.25")]
    answers = {name: np.asarray(Image.open(tmp_path / "candidates" / name)) for name in names}
    assert len({answer.tobytes() for answer in answers.values()}) == 6
    assert (np.asarray(Image.open(tmp_path / "inputs" / "000001.png")) == np.asarray(SAMPLES[1].image)).all()
    assert len(list((tmp_path / "sheets").iterdir())) == 3 and not list((tmp_path / "picks").iterdir())


def test_a_stopped_run_continues_to_the_same_files(pipe, tmp_path):
    make_candidates(pipe, SAMPLES, tmp_path, **SMALL)
    whole = tiny.contents(tmp_path)
    for name in ("sheets/000002.png", "candidates/000002_01_s3_i1.25.png"):
        (tmp_path / name).unlink()
    untouched = tmp_path / "candidates" / "000000_00_s1.5_i1.png"
    untouched.rename(tmp_path / "picks" / untouched.name)  # some candidates are already selected
    make_candidates(pipe, SAMPLES, tmp_path, **SMALL)
    again = tiny.contents(tmp_path)
    assert not untouched.exists(), "candidates that were moved are not made again"
    assert again.pop("picks/000000_00_s1.5_i1.png") == whole.pop("candidates/000000_00_s1.5_i1.png")
    assert again == whole
    with pytest.raises(ValueError, match="same run; seed was 0 and is 1"):
        make_candidates(pipe, SAMPLES, tmp_path, **SMALL, seed=1)
    other = [Sample(sample.image, sample.image, sample.instruction) for sample in SAMPLES]
    with pytest.raises(ValueError, match="same run; content was"):
        make_candidates(pipe, other, tmp_path, **SMALL)
    with pytest.raises(ValueError, match="at least one sample"):
        make_candidates(pipe, [], tmp_path / "none")


def test_selected_candidates_are_edits_of_their_inputs(pipe, tmp_path):
    make_candidates(pipe, SAMPLES, tmp_path, **SMALL)
    with pytest.raises(ValueError, match="picks is empty; move the best of .*candidates there"):
        load_preferences(tmp_path)
    for name in ("000002_00_s1.5_i1.png", "000002_01_s3_i1.25.png", "000000_01_s3_i1.25.png"):
        (tmp_path / "candidates" / name).rename(tmp_path / "picks" / name)
    (tmp_path / "picks" / "999999_00_s1_i1.png").write_bytes(b"")
    data = load_preferences(tmp_path)
    assert len(data) == 3 and data.skipped == [("inputs/999999.png", "a missing file")]
    image, edit = data[2]
    assert edit.instruction == "paint 2" and (np.asarray(image) == np.asarray(SAMPLES[2].image)).all()
    assert (np.asarray(edit.edited) == np.asarray(Image.open(tmp_path / "picks" / "000002_01_s3_i1.25.png"))).all()
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[1])["instruction"] == "paint 1"


def test_candidates_have_the_size_of_their_sample(pipe, tmp_path):
    image = tiny.picture(48, 48)
    assert pipe.default_resolution == 32
    pipe.register_to_config(task_settings={"editing": {"ensemble_size": 2}})  # a candidate is one image
    make_candidates(pipe, [Sample(image, image, "paint")], tmp_path, [(3.0, 1.0)], 2, seed=4)
    seed = int(np.random.SeedSequence((4, 0, 0)).generate_state(1)[0])
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "image_guidance_scale": 1.0, "resolution": 0}
    settings["ensemble_size"] = 1
    (expected,) = pipe("paint", image, generator=torch.Generator().manual_seed(seed), **settings).images
    (path,) = (tmp_path / "candidates").iterdir()
    assert (np.asarray(Image.open(path)) == np.asarray(expected)).all()


def test_the_grid_has_the_twenty_settings_of_the_paper():
    assert len(set(GUIDANCE_GRID)) == 20
