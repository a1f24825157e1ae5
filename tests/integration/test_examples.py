"""Every configuration of `examples/` trains the tiny model for two steps: the files as they stand, made small by flags alone.

All examples on clips read the same two clips with the same seed, so their losses can be compared with those of `video`: a memory strategy
and a held-out clip change no bit, 8-bit weights little, and whatever is given or taken away must show.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from integration.project import Project, add_clip, moving_picture, tone
from tuner.data.media import write_mp4, write_wav
from tuner.interfaces.encoders import VideoClip
from tuner_ltxvideo2.tiny import TinyPaths

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = {path.stem: path for path in sorted((EXAMPLES / "configs").glob("*.json"))}
SMALL = ("--mixed_precision", "no", "--resolution", "64", "--lora_rank", "4", "--validation_disable", "--max_train_steps")
TINY = {"dev": "tiny", "2.3-dev": "tiny-2.3", "2.5-dev": "tiny-2.5"}

PICTURE = frozenset({"attn1", "attn2"})
SOUND = frozenset({"audio_attn1", "audio_attn2", "audio_ff"})
CROSSING = frozenset({"audio_to_video_attn", "video_to_audio_attn"})


@dataclass(frozen=True)
class Expected:
    """What a run leaves."""

    streams: str = "video audio"
    """Those with a loss."""
    layers: frozenset[str] = PICTURE | SOUND | CROSSING
    """Kinds of layers inside the blocks that the adapter file has; empty: all weights are trained."""
    like_video: str = "other"
    """Losses beside those of the example `video`: "same" to the last bit, "close" but rounded, "other"."""
    says: tuple[str, ...] = ()
    """Lines of the plan and notices, as patterns."""
    flags: tuple[str, ...] = ()
    """What makes it small, or certain where it is a matter of chance, beside what all examples get."""
    steps: int = 2
    facts: Mapping[str, str] | None = None
    """Of the adapter file's metadata."""


EXPECTED: dict[str, Expected] = {
    "video": Expected(like_video="same", says=(r"found 2 = used 2", r"2 clips with sound \(1\.4 s trained\)", r"64x64@17 \(2\)")),
    "images": Expected("video", PICTURE, says=(r"64x64@1 \(2\)",)),
    "mixed": Expected("video audio", says=(r"64x64@1 \(2\)", r"64x64@17 \(1\)", r"64x64@49 \(1\)"), steps=4),
    "sound": Expected("audio", SOUND, says=(r"1 s of sound \(2\)", r"2 sounds alone")),
    "linked-sound": Expected(says=(r"2 of the used belong", r"2 clips with sound")),
    "held-out": Expected(like_video="same", says=(r"found 3 = used 2 \+ skipped 0 \+ failed 0 \+ held out 1",)),
    "validation": Expected(
        like_video="same",
        says=(r"1 sample: sample; loss of 1 held-out file at 1 noise level", r"step 1: sampled sample\.mp4", "held-out loss video"),
        flags=(
            "--validation_disable", "false", "--validation_step_interval", "1", "--validation_using_datasets", "false",
            "--eval_timesteps", "1", "--validation_resolution", "64x64", "--validation_num_video_frames", "9",
            "--validation_num_inference_steps", "1",
            "--validation_guidance", "1",
        ),
    ),
    "image-to-video": Expected(flags=("--i2v_conditioning_probability", "1")),
    "continuation": Expected(flags=("--prefix_conditioning_probability", "1")),
    "lead-in": Expected(flags=("--suffix_conditioning_probability", "1")),
    "outpainting": Expected(flags=("--crop_conditioning_probability", "1")),
    "inpainting": Expected(says=(r"2 of the used belong",)),
    "ic-lora": Expected(says=(r"2 of the used belong",), facts={"reference_downscale_factor": "2"}),
    "sound-to-video": Expected("video", PICTURE | {"audio_to_video_attn"}),
    "video-to-sound": Expected("audio", SOUND | {"video_to_audio_attn"}),
    "scheduled-sampling": Expected(flags=("--scheduled_sampling_prob_start", "1", "--scheduled_sampling_prob_end", "1")),
    "tread": Expected(says=(r"tread: 50% of the video tokens skip block 2, of 4 blocks",)),
    "crepa": Expected(
        like_video="same",  # the forward pass is left alone, and with its warm-up the learning rate of the first step is 0
        says=(r"crepa: tokens after block 1 of 4 are drawn to tiny at 56 px",),
        flags=("--crepa_block_index", "1", "--crepa_encoder", "tiny", "--crepa_encoder_image_size", "56", "--crepa_warmup_steps", "0"),
    ),
    "full": Expected("audio", frozenset(), says=(r"all weights",)),
    "ltx-2.3": Expected(says=(r"ltxvideo2 2\.3",)),
    "ltx-2.5": Expected(says=(r"ltxvideo2 2\.5",)),
    "group-offload": Expected(like_video="same", says=(r"group_offload: 4 groups of 1 block",)),
    "block-swap": Expected(like_video="same", says=(r"block_swap: 3 of 4 blocks",), flags=("--musubi_blocks_to_swap", "3")),
    "ramtorch": Expected(like_video="same", says=(r"ramtorch: 112 of 112 linear layers",)),
    "int8-torchao": Expected(like_video="close", says=(r"int8-torchao: 0\.02 -> 0\.01 GiB",)),
    "int8-quanto": Expected(like_video="close", says=(r"int8-quanto: 0\.02 -> 0\.01 GiB", r"text encoder int8-quanto")),
    "24gb": Expected(like_video="close", says=(r"int8-torchao: 0\.02 -> 0\.01 GiB", r"ramtorch: \d+ of 112 linear layers")),
}


def write_datasets(root: Path) -> None:
    """One folder for each that the examples name, below `root`."""
    for index, name in enumerate(("kite", "wave")):
        add_clip(root / "videos", name, frames=17)
        for folder in ("images", "masks", "audio", "voices", "references"):
            (root / folder).mkdir(exist_ok=True)
        picture, half = moving_picture(17, 96, 64, 0.4 + index), np.zeros((64, 96, 3), np.uint8)
        half[:, 48:] = 255
        write_mp4(root / "references" / f"{name}.mp4", VideoClip(picture, 25.0))
        Image.fromarray(half).save(root / "masks" / f"{name}.png")
        Image.fromarray(picture[0].numpy()).save(root / "images" / f"{name}.png")
        write_wav(root / "audio" / f"{name}.wav", tone(1.2, 300.0 + 90 * index))
        write_wav(root / "voices" / f"{name}.wav", tone(0.7, 200.0 + 50 * index))
        for folder in ("images", "audio"):
            (root / folder / f"{name}.txt").write_text(f"{folder} of a {name}")
    add_clip(root / "scenes", "short", frames=17)
    add_clip(root / "scenes", "long", frames=49)
    (root / "exam").mkdir()
    write_mp4(root / "exam" / "bird.mp4", VideoClip(moving_picture(17, 96, 64, 3.3), 25.0))
    (root / "exam" / "bird.txt").write_text("a bird")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Path:
    """A working folder with the examples, what they train on, and a cache that all of them fill."""
    root = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES / "configs", root / "examples" / "configs")
    shutil.copytree(EXAMPLES / "datasets", root / "examples" / "datasets")
    write_datasets(root / "datasets")
    (root / "cache" / "models").mkdir(parents=True)
    (root / "cache" / "models" / "tiny").symlink_to(tiny.checkpoint.parent)
    return root


@pytest.fixture
def there(folder: Path, tiny: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The working folder, entered."""
    monkeypatch.chdir(folder)
    return Project(folder, tiny)


def train(project: Project, name: str, *flags: str, steps: int = 2) -> int:
    """The exit code of the example made small."""
    content = json.loads(CONFIGS[name].read_text())
    shutil.rmtree(content["output_dir"], ignore_errors=True)
    flavour = TINY[content["model_flavour"]]
    return project.tuner("train", "--config", f"examples/configs/{name}.json", "--model_flavour", flavour, *SMALL, steps, *flags)


Losses = list[Mapping[str, float]]


@dataclass(frozen=True)
class Trained:
    """What an example printed, and stream -> loss for each step."""

    shown: str
    losses: Losses


def trained(project: Project, name: str) -> Trained:
    """Trains an example as it is expected to be."""
    expected, printed = EXPECTED[name], io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train(project, name, *expected.flags, steps=expected.steps) == 0
    rows = [row for row in project.metrics(f"output/{name}") if "loss" in row]
    assert len(rows) == expected.steps
    losses = [{key: row[key] for key in ("loss/video", "loss/audio") if key in row} for row in rows]
    return Trained(" ".join(printed.getvalue().split()), losses)


@pytest.fixture(scope="module")
def video(folder: Path, tiny: TinyPaths) -> Trained:
    """The example that others are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return trained(Project(folder, tiny), "video")


def adapter(name: str) -> tuple[frozenset[str], Mapping[str, str]]:
    """Kinds of layers inside the blocks, and the file's metadata."""
    with safe_open(Path("output", name, "lora.safetensors"), framework="pt") as file:
        keys = list(file.keys())
        return frozenset(key.split(".")[3] for key in keys if ".transformer_blocks." in key), file.metadata()


def check_losses(found: Losses, expected: Expected, reference: Losses) -> None:
    """Of the right streams, finite, and beside those of `video` as expected."""
    streams = {key.removeprefix("loss/") for row in found for key in row}
    assert streams == set(expected.streams.split()) and all(math.isfinite(loss) for row in found for loss in row.values())
    if expected.like_video == "same":
        assert found == reference
        return
    assert found != reference
    if expected.like_video == "close":
        for row, other in zip(found, reference, strict=True):
            assert row == pytest.approx(other, rel=0.02)  # 8 bits a weight: 0.4 % of its largest, and the tiny model is random


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_trains(name: str, there: Project, video: Trained) -> None:
    expected = EXPECTED[name]
    run = video if name == "video" else trained(there, name)
    assert [pattern for pattern in expected.says if not re.search(pattern, run.shown)] == []
    notices = there.events("started", f"output/{name}")[0]["notices"]
    small = ("lr_warmup_steps: ", "train_batch_size: ")  # two steps are no warm-up, two files no batch of four
    assert [n for n in notices if not n.startswith(small)] == []  # type: ignore[attr-defined]
    check_losses(run.losses, expected, video.losses)
    if not expected.layers:
        assert Path("output", name, "transformer.safetensors").is_file()
        return
    layers, metadata = adapter(name)
    assert layers == expected.layers and (expected.facts or {}).items() <= metadata.items()


def test_an_example_is_planned_at_its_own_size_and_with_its_sample(there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    config = "examples/configs/video.json"
    assert there.tuner("train", "--dry-run", "--config", config, "--model_flavour", "tiny", "--output_dir", "output/planned") == 0
    assert "608x416@17 (2)" in capsys.readouterr().out


def test_every_example_is_expected_listed_and_uses_a_dataset_of_its_own_folder() -> None:
    assert EXPECTED.keys() == CONFIGS.keys()
    page = (EXAMPLES / "README.md").read_text()
    assert re.findall(r"^\| \[`([\w.-]+)`\]\(configs/\1\.json\)", page, re.MULTILINE) == list(EXPECTED)
    used = {json.loads(path.read_text())["data_backend_config"] for path in CONFIGS.values()}
    assert used == {f"examples/datasets/{path.name}" for path in (EXAMPLES / "datasets").iterdir()}
    outputs = [json.loads(path.read_text())["output_dir"] for path in CONFIGS.values()]
    assert outputs == [f"output/{name}" for name in CONFIGS]


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("datasets/videos", "datasets/vidoes", 4, ["entry 'clips': datasets/vidoes", "instance_data_dir"]),
        ("min_frames", "min_frame", 2, ["video.min_frame: unknown key; did you mean `min_frames`"]),
        ('"masks"]', '"mask"]', 2, ["conditioning_data: there is no entry 'mask'; did you mean 'masks'"]),
        ('"textfile"', '"textfiles"', 2, ["caption_strategy: must be 'textfile'", "'textfiles'"]),
    ],
    ids=["folder", "key", "id", "value"],
)
def test_a_slip_in_a_copy_is_named(
    old: str, new: str, code: int, words: list[str], there: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / "datasets" / "masked.json").read_text()
    assert old in text
    Path("slip.json").write_text(text.replace(old, new))
    assert train(there, "inpainting", "--dry-run", "--data_backend_config", "slip.json") == code
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
