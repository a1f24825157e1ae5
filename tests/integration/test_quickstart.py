"""The files of the LTX Video 2 quickstart, as that page has them, in `quickstart/`: they are read, planned and trained unchanged.

`minimal-vram-7900xtx.json` is a configuration; `group-offload.json` and `tread.json` are keys that the page has added to one; the two
`dataset-*.json` are dataset files, put where a configuration says. The dataset of clips asks for 61 frames at 512 pixels, which a CPU
plans and does not train in the time that a test has: for that alone its `resolution` is changed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from integration.project import Project, add_clip, tone
from tuner.data.media import write_wav
from tuner_ltxvideo2.tiny import TinyPaths

FILES = Path(__file__).parent / "quickstart"
DATASET = Path("config/ltx2/multidatabackend.json")
"""Where the configuration names it."""
SMALL = ("--model_flavour", "tiny", "--max_train_steps", "2")
FP32 = ("--mixed_precision", "no")
"""A CPU computes faster in it; the first run does without."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Path:
    """The quickstart's working folder: a clip, two sounds, and the tiny model where the flavour looks for it."""
    root = tmp_path_factory.mktemp("quickstart")
    add_clip(root / "datasets/videos", "sign", frames=62)
    (root / "datasets/audio").mkdir()
    for name, seconds in (("short", 3.2), ("long", 4.1), ("blip", 0.8)):
        write_wav(root / "datasets/audio" / f"{name}.wav", tone(seconds, 400.0))
        (root / "datasets/audio" / f"{name}.txt").write_text(f"a {name} tone")
    (root / DATASET.parent).mkdir(parents=True)
    (root / "cache/models").mkdir(parents=True)
    (root / "cache/models/tiny").symlink_to(tiny.checkpoint.parent)
    return root


@pytest.fixture
def there(folder: Path, tiny: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The working folder, entered, with the dataset of clips in its place."""
    monkeypatch.chdir(folder)
    DATASET.write_text((FILES / "dataset-video.json").read_text())
    return Project(folder, tiny)


def configuration(*added: str, without: str = "") -> Path:
    """config/config.json: the page's configuration with the keys of `added`, less those that begin with `without`."""
    values = json.loads((FILES / "minimal-vram-7900xtx.json").read_text())
    kept = {key: value for key, value in values.items() if not without or not key.startswith(without)}
    for name in added:
        kept |= json.loads((FILES / f"{name}.json").read_text())
    path = Path("config/config.json")
    path.write_text(json.dumps(kept))
    return path


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, broken lines joined."""
    return " ".join("".join(capsys.readouterr()).split())


def check_run(project: Project, out: str, streams: set[str]) -> None:
    rows = project.metrics(out)
    assert len(rows) == 2 and {f"loss/{name}" for name in streams} <= rows[0].keys() and all(math.isfinite(row["loss"]) for row in rows)
    with safe_open(Path(out, "lora.safetensors"), framework="pt") as file:
        assert any(".attn1." in key for key in file.keys()) == ("video" in streams)  # noqa: SIM118 - not a mapping


def test_the_smallest_configuration_is_planned_at_the_size_it_asks_for(there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert there.tuner("train", "--dry-run", "--config", configuration(), "--model_flavour", "tiny") == 0
    text = shown(capsys)
    patterns = (
        r"608x416@57 \(1\)", "200 steps of 1 x 2 clips", "int8-quanto", r"ramtorch: \d+ of 112 linear layers", "num_frames 61 -> 57",
        "lycoris_config: 'config/lycoris_config.json' has no effect", "override_dataset_config: True has no effect",
        "audio.duration_interval has no effect here",
    )  # fmt: skip
    assert [pattern for pattern in patterns if not re.search(pattern, text)] == []
    assert text.count("has no effect") == 3


@pytest.mark.parametrize(
    ("config", "flags", "memory"),
    [([], (), "ramtorch"), (["group-offload"], FP32, "group_offload")],
    ids=["minimal-vram-7900xtx", "group-offload"],
)
def test_clips_train(config: list[str], flags: tuple[str, ...], memory: str, there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(DATASET.read_text())
    entries[0]["resolution"] = 64
    DATASET.write_text(json.dumps(entries))
    out, path = f"output/{memory}", configuration(*config, without="ramtorch" if config else "")
    assert there.tuner("train", "--config", path, "--output_dir", out, *SMALL, *flags) == 0
    assert re.search(rf"64x64@57 .* {memory}: ", shown(capsys))
    check_run(there, out, {"video", "audio"})


def test_sounds_alone_train(there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    DATASET.write_text((FILES / "dataset-audio-only.json").read_text())
    assert there.tuner("train", "--config", configuration(), "--output_dir", "output/sounds", *SMALL, *FP32) == 0
    text = shown(capsys)
    assert "3 s of sound (2)" in text and "1 skipped: sound too short" in text and "2 sounds alone" in text
    check_run(there, "output/sounds", {"audio"})


@pytest.mark.parametrize("as_file", [False, True], ids=["as keys", "as a file"])
def test_token_routing_trains(as_file: bool, there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(DATASET.read_text())
    entries[0]["resolution"] = 64
    DATASET.write_text(json.dumps(entries))
    path, out = configuration(*([] if as_file else ["tread"])), f"output/tread-{as_file}"
    if as_file:
        Path("config/tread.json").write_text((FILES / "tread.json").read_text())
    flags = (*SMALL, *FP32, *(("--tread_config", "config/tread.json") if as_file else ()))
    assert there.tuner("train", "--config", path, "--output_dir", out, *flags) == 0
    assert re.search(r"tread: 50% of the video tokens skip block 2, of 4 blocks .* ramtorch: ", shown(capsys))
    check_run(there, out, {"video", "audio"})
