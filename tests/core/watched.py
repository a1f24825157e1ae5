"""Run folders as runs write them, made in a moment."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tuner.data.media import write_mp4, write_wav
from tuner.html.page import VOID
from tuner.interfaces.encoders import AudioClip, VideoClip
from tuner.train.run import RunFolder, RunInfo

SECRET = "hf_" + "Q" * 30
NASTY = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> & \"quotes\" 'too'"
GIB = 2**30


def small_clip(path: Path, frames: int = 5) -> Path:
    """An mp4 with sound, a few kilobytes."""
    pixels = (torch.arange(frames * 32 * 48 * 3) % 251).reshape(frames, 32, 48, 3).to(torch.uint8)
    write_mp4(path, VideoClip(pixels, 25.0), AudioClip(torch.zeros(2, 16000 * frames // 25), 16000, 0))
    return path


def small_sound(path: Path) -> Path:
    """A wav."""
    write_wav(path, AudioClip(torch.sin(torch.arange(4000) / 9).expand(2, -1), 16000, 4000))
    return path


def jpeg() -> str:
    """A picture as dataset.json holds it."""
    target = io.BytesIO()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(target, "JPEG")
    return base64.b64encode(target.getvalue()).decode()


def metrics_row(step: int) -> dict[str, float]:
    """Numbers of a step; every second one has no audio."""
    row = {"loss": 1 / step, "grad_norm": 0.5, "loss/video": 0.75 / step, f"loss/video/sigma_0.{25 * (step % 3):02d}-0.75": 0.1, "lr": 1e-4}
    return row | ({"loss/audio": 0.25 / step, "alignment/video": math.sin(step)} if step % 2 else {})


def write_run(folder: Path, steps: int = 20, state: str = "finished", samples: bool = True) -> RunFolder:
    """A run with everything that a report shows, hostile texts included."""
    run = RunFolder(folder)
    settings = {"data": "/data/private clips/here", "hub_token": SECRET, "seed": 42, "validation_prompt": NASTY}
    info = RunInfo(folder, "tiny", "2.0", settings, (("tuner-x", "1.2"),), "2026-01-01T00:00:00.000+00:00", "tiny.safetensors")
    run.write_run(info, "Some GPU")
    run.write_config({
        **{key: {"value": value, "origin": "file"} for key, value in settings.items()},
        "checkpoint_step_interval": {"value": 10, "origin": "default"}, "lora_rank": {"value": 16, "origin": "default"},
    })
    run.event("started", total_steps=steps, notices=[f"notice {NASTY}", f"clip {folder.resolve()}/x and /data/somebody/deep/file.mp4"])
    run.event("cached", found=3, failures=[])
    for step in range(1, steps + 1):
        run.metrics(step, metrics_row(step))
        run.pace(step, {"seconds": 1.5, "memory": {"place": "GPU", "now": 10 * GIB, "peak": 12 * GIB, "limit": 24 * GIB}})
    for step in (0, steps):
        run.event("heldout", step=step, losses={"video": 0.5 + step, "audio": 0.25}, items=4)
        if samples:
            small_clip(folder / "validation" / f"step_{step}" / "own name.mp4")
            path = f"validation/step_{step}/own name.mp4"
            run.event("sample", step=step, path=path, prompt=NASTY, label="first", mode="t2v", seconds=1.0)
    if samples:
        small_sound(folder / "validation" / f"step_{steps}" / "noise.wav")
        path = f"validation/step_{steps}/noise.wav"
        run.event("sample", step=steps, path=path, prompt="a hum", label="noise", mode="audio", seconds=1.0)
        run.event("sample_failed", step=0, label="noise", reason=f"no memory at {folder.resolve()}/validation; {NASTY}")
    run.event("checkpoint", step=steps, path=f"checkpoint-{steps}")
    write_dataset(run)
    memory = {"place": "GPU", "now": 10 * GIB, "peak": 12 * GIB, "limit": 24 * GIB}
    row = {name: value for name, value in metrics_row(steps).items() if name.count("/") < 2}
    run.heartbeat(steps, steps, state, {"seconds_per_step": 1.5, "metrics": {**row, "samples": 3.0}, "memory": memory})
    return run


def write_dataset(run: RunFolder) -> None:
    """dataset.json with a clip, a sound and hostile names."""
    clip = {"dataset": "mine", "name": "<b>.mp4", "kind": "video", "bucket": "64x64@9", "seconds": 0.36, "sound": "yes", "held_out": False,
            "repeats": 2, "caption": NASTY, "picture": jpeg(), "wave": []}
    sound = {**clip, "name": "hum.wav", "kind": "audio", "bucket": "1 s of sound", "sound": "alone", "held_out": True, "caption": "a hum",
             "picture": "", "wave": [[-0.5, 0.5]] * 8}
    run.write_dataset({
        "digest": "d", "summary": "found 3 = used 2 + skipped 1 + failed 0", "sound": "1 clips with sound; in 50% of the batches",
        "counts": {"used": 2}, "left_out": [{"status": "skipped", "reason": "too short", "files": 1}],
        "buckets": [{"bucket": "64x64@9", "items": 1}], "items": 4, "clips": [clip, sound],
    })


class Page(HTMLParser):
    """A parsed page: every element with its attributes, the text outside scripts and styles, and whether elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in self.raw:
            self.raw[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, in one line."""
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all elements of this name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def addresses(self) -> list[str]:
        """Everything that a browser could fetch."""
        keys = ("src", "href", "poster", "srcset", "data", "action", "formaction", "xlink:href", "background")
        return [value for _, attributes in self.elements for key, value in attributes.items() if key in keys]

    @property
    def data(self) -> dict[str, object]:
        """What the script draws."""
        index = next(i for i, attributes in enumerate(self.named("script")) if attributes.get("id") == "data")
        content = json.loads(self.raw["script"][index])
        assert isinstance(content, dict)
        return content
