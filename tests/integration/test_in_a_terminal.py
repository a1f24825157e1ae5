"""What people look at, on a real pseudo-terminal, wide and narrow: no line is broken by the terminal, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from integration.processes import Launcher
from integration.project import Project, add_damaged_clip
from integration.typed import ForkedCommand

WIDTHS = pytest.mark.parametrize("columns", [80, 40])
SAMPLES = {
    "validation_disable": False, "validation_prompt": "a drifting pattern", "validation_resolution": "64x64",
    "validation_num_video_frames": 9, "validation_num_inference_steps": 1, "validation_guidance": 1,
}  # fmt: skip


def config(project: Project, **changes: object) -> str:
    """The project's configuration with paths as people write them: short ones."""
    return project.config(data="clips", cache_dir="cache", output_dir="out", **changes).name


def shown(launcher: Launcher, columns: int, *arguments: object, code: int = 0) -> list[str]:
    """The lines of a command that asks nothing, without empty ones."""
    with ForkedCommand(launcher, *arguments, columns=columns) as command:
        assert command.end() == code, command.seen
        assert "Traceback" not in command.seen and command.raw.count("\x1b[?25h") >= command.raw.count("\x1b[?25l")
        return [line for line in command.lines() if line]


def words(lines: list[str]) -> str:
    """In one line, wherever they are broken."""
    return " ".join(" ".join(lines).split())


@WIDTHS
def test_a_run_and_its_status(project: Project, launcher: Launcher, columns: int) -> None:
    lines = shown(launcher, columns, "train", "--config", config(project, **SAMPLES))
    text = words(lines)
    assert "found 4 = used 4 + skipped 0 + failed 0" in text and "ltxvideo2-tiny-2.0-seed0.safetensors" in re.sub(r"\s", "", text)
    live = next(index for index, line in enumerate(lines) if line.startswith("4/4"))
    assert not [line for line in lines[:live] if re.match(r"\d+/4 ", line)], "an earlier drawing was left behind"
    assert re.search(r"s/step .*RAM .*loss video [\d.]+ \| audio [\d.]+ .*ETA 0:00:00 checkpoint out/checkpoint-4", words(lines[live:]))
    assert [line for line in lines[:live] if re.match(r"encoding text +━+ \d+/\d+ ", line)], "a bar ends full and stays"

    one = shown(launcher, columns, "status", "out")
    assert one[0].split() == ["run", "out"] and "4/4 (100%)" in words(one) and "checkpoint-4" in words(one)
    shutil.copytree("out", "second")
    several = shown(launcher, columns, "status", ".")
    assert {"out", "second"} <= {line.split()[0] for line in several} and words(several).count("finished") == 2


@WIDTHS
def test_ctrl_c_while_another_terminal_watches(project: Project, launcher: Launcher, columns: int) -> None:
    with ForkedCommand(launcher, "train", "--config", config(project, max_train_steps=5000), columns=columns) as run:
        run.wait_for(r"[23]/5000")
        with ForkedCommand(launcher, "status", "out", "--watch", "0.2", columns=columns) as status:
            status.wait_for(r"state +running")
            run.type("\x03")
            assert run.end() == 130, run.seen
            status.wait_for(r"state +stopped")
            assert status.end() == 0 and status.lines()
    text = words(run.lines())
    step = re.search(r"stopped at step (\d+); go on with --resume_from_checkpoint latest", text)
    assert step and f"checkpoint out/checkpoint-{step[1]}" in text and Path(f"out/checkpoint-{step[1]}").is_dir()
    assert run.raw.rindex("\x1b[?25h") > run.raw.rindex("\x1b[?25l")


def test_a_terminal_that_goes_stops_the_run_in_order(project: Project, launcher: Launcher) -> None:
    with ForkedCommand(launcher, "train", "--config", config(project, max_train_steps=5000), columns=80) as run:
        run.wait_for(r"[23]/5000")
        run.hang_up()
        assert run.end() == 129
    (event,) = [json.loads(line) for line in Path("out/events.jsonl").read_text().splitlines() if '"stopped"' in line]
    assert Path(f"out/checkpoint-{event['step']}").is_dir() and event["step"] < 5000


@WIDTHS
def test_a_dataset_is_inspected(project: Project, launcher: Launcher, columns: int) -> None:
    add_damaged_clip(Path("clips"), "torn")
    lines = shown(launcher, columns, "inspect", "--family", "ltxvideo2", "--data", "clips", "--resolution", 64)
    text = words(lines)
    assert "failed: the frame at 0.600 s is damaged" in text and "found 5 = used 4 + skipped 0 + failed 1" in text
    assert [line.split()[1] for line in lines if line.startswith("clips ") or line.startswith("data ")] == [
        "amber.mp4", "birch.mp4", "cedar.mp4", "dusk.mp4", "torn.mp4",
    ]  # fmt: skip


@WIDTHS
def test_memory_is_planned(project: Project, launcher: Launcher, columns: int) -> None:
    lines = shown(launcher, columns, "plan", "--config", config(project), "--gpu_memory", "24GiB", "--host_memory", "64GiB")
    assert "combinations; 0 are too large" in words(lines) and '"musubi_blocks_to_swap": 1' in words(lines)
    lines = shown(launcher, columns, "plan", "--config", config(project), "--gpu_memory", "24 parsecs", code=2)
    assert "is no size of memory" in words(lines) and "-> write 24GiB" in words(lines)


@WIDTHS
def test_the_machine_is_looked_at(project: Project, launcher: Launcher, columns: int) -> None:
    lines = shown(launcher, columns, "doctor")
    assert re.search(r"training would work here: 0 problems, \d+ notes?$", words(lines))
    assert len([line for line in lines if line.startswith(("ok  ", "note "))]) > 20 and not [line for line in lines if "problem  " in line]


@WIDTHS
def test_help_and_lists(project: Project, launcher: Launcher, columns: int) -> None:
    assert "Ask what is to be trained, and write the configuration." in words(shown(launcher, columns, "--help"))
    assert "until no run is going on" in words(shown(launcher, columns, "status", "--help"))
    assert "memory_strategy group_offload, block_swap, ramtorch" in words(shown(launcher, columns, "plugins"))


@WIDTHS
def test_a_configuration_is_typed(project: Project, launcher: Launcher, columns: int) -> None:
    """From the first question to the files, with an explanation and a mistake."""
    flags = ("--data", "clips", "--resolution", 64, "--max_train_steps", 2, "--optimizer", "adamw", "--lora_rank", 4)
    asked = {
        "Enter for none": "", r"\[ltxvideo2\]": "", r"\[dev\]": "tiny", r"\[lora\]": "?", r"full\) \[lora\]": "", "Weights of your own": "",
        r"\[(no|bf16)\]": "no", r"\[clips\]": "", r"\[textfile\]": "", "trigger word": "", "How many frames": "0", "How many frames ": "9",
        "silence": "y", "sound too": "", "in a batch": "", "Learning rate": "", "the result": "", "A checkpoint": "", "Prompt of": "",
        "tokens that skip": "", "CREPA": "",
    }  # fmt: skip
    with ForkedCommand(launcher, "configure", *flags, columns=columns, environment={"PATH": "/nowhere"}) as command:
        for question, answer in asked.items():
            command.answer(question.replace(" ", r"\s+") + r"(.|\n)* $", answer)  # a question ends with a space, and then nothing comes
        assert command.end() == 0, command.seen
        assert "must be at least 1" in words(command.lines())
    assert json.loads(Path("config/config.json").read_text())["lora_rank"] == 4
