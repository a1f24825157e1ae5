"""The files of a run folder: whole lines, replaced in one go, free of secrets."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.config.masking import MASK, is_secret, masked
from tuner.errors import DiskError
from tuner.train.run import RunFolder, RunInfo


def rows(path: Path) -> list[dict[str, Any]]:
    """The file's lines, parsed as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_run_json_names_versions_and_plugins(tmp_path: Path) -> None:
    info = RunInfo(tmp_path, "tiny", "1.0", {"seed": 7, "hub_token": "abc"}, (("tuner-x", "1.2"),), "2026-01-01T00:00:00+00:00")
    RunFolder(tmp_path / "a" / "b").write_run(info)
    run = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__.partition("+")[0] or run["versions"]["torch"] == torch.__version__
    assert run["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run["plugins"] == {"tuner-x": "1.2"}
    assert (run["family"], run["variant"], run["started"]) == ("tiny", "1.0", "2026-01-01T00:00:00+00:00")
    assert run["device"]
    assert run["settings"] == {"seed": 7, "hub_token": MASK}


def test_config_keeps_value_and_origin_and_masks_again(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config({
        "output_dir": {"value": Path("out"), "origin": "flag"},
        "wandb_api_key": {"value": "k-123", "origin": "environment"},
        "tracker": {"value": {"password": "x", "url": "https://me:pw@host/p"}, "origin": "file"},
        "hf_token": {"value": None, "origin": "default"},
    })
    assert json.loads((tmp_path / "config.resolved.json").read_text()) == {
        "output_dir": {"value": "out", "origin": "flag"},
        "wandb_api_key": {"value": MASK, "origin": "environment"},
        "tracker": {"value": {"password": MASK, "url": f"https://{MASK}@host/p"}, "origin": "file"},
        "hf_token": {"value": None, "origin": "default"},
    }
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize(
    "key", ["hub_token", "HF_TOKEN", "accessToken", "client-secret", "a.password", "api_key", "wandbApiKey", "aws_access_key_id"]
)
def test_secret_keys(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize("key", ["tokenizer", "base_tokens", "keyframes", "monkey", "caption_strategy", "loss/video"])
def test_open_keys(key: str) -> None:
    assert not is_secret(key)


def test_masked_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        masked({"loss": torch.zeros(1)})


def test_events_carry_time_kind_and_facts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.event("adjusted", what="frames", before=61, after=57, scale=math.inf)
    run.event("saved", path=tmp_path, text="line\nbreak", upload="hf_" + "a" * 30)
    first, second = rows(tmp_path / "events.jsonl")
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {"kind": "adjusted", "what": "frames", "before": 61, "after": 57, "scale": None}
    assert second["path"] == str(tmp_path)
    assert second["text"] == "line\nbreak"
    assert second["upload"] == MASK


def test_file_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    run = RunFolder(tmp_path)
    run.event("failed", file=name)
    run.write_dataset({"files": [name]})
    assert rows(tmp_path / "events.jsonl")[0]["file"] == name
    assert json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))["files"] == [name]


def test_metrics_hold_exact_numbers_and_null_for_what_is_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics(1, {"loss": 0.1 + 0.2, "grad_norm": math.nan, "up": math.inf, "down": -math.inf, "count": 3})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1 + 0.2, "grad_norm": None, "up": None, "down": None, "count": 3}]


def test_metrics_after_a_resume_equal_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    for step in range(1, 11):
        whole.metrics(step, {"loss": 1 / step})
    for step in range(1, 8):
        resumed.metrics(step, {"loss": 1 / step})
    again = RunFolder(tmp_path / "resumed")
    assert again.drop_metrics_after(4) == 3
    for step in range(5, 11):
        again.metrics(step, {"loss": 1 / step})
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "resumed" / "metrics.jsonl").read_bytes()
    assert again.drop_metrics_after(-1) == 10
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == b""
    assert RunFolder(tmp_path / "fresh").drop_metrics_after(0) == 0


def test_torn_last_line_of_a_crash_is_cut_off(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo')
    run.metrics(2, {"loss": 0.5})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3')
    assert run.drop_metrics_after(3) == 1
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


WRITER = """
import sys
from pathlib import Path
from tuner.train.run import RunFolder
run = RunFolder(Path(sys.argv[1]))
for index in range(300):
    run.event("line", writer=sys.argv[2], index=index, padding="x" * 300)
"""


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = rows(tmp_path / "events.jsonl")
    for name in ("a", "b"):
        assert [line["index"] for line in lines if line["writer"] == name] == list(range(300))


def test_heartbeat_is_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.heartbeat(3, 10, "training")
    run.heartbeat(4, 10, "saving")
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["total"], beat["state"], beat["pid"]) == (4, 10, "saving", os.getpid())
    assert datetime.fromisoformat(beat["time"])
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_unwritable_places_are_disk_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "run")
    run = RunFolder(tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        run.event("x")
    (tmp_path / "run" / "heartbeat.json").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        run.heartbeat(1, 2, "training")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["events.jsonl", "heartbeat.json"]


def test_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.event("first")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(DiskError, match="No space left"):
        run.event("second")
    monkeypatch.undo()
    run.event("third")
    assert [row["kind"] for row in rows(tmp_path / "events.jsonl")] == ["first", "third"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(values)
def test_whatever_is_masked_is_strict_json_and_stays_so(value: object) -> None:
    once = masked(value)
    json.dumps(once, allow_nan=False)
    assert masked(once) == once


def test_importing_costs_no_torch() -> None:
    modules = "tuner.train.run, tuner.train.saving.lock, tuner.train.signals, tuner.cli.status_line"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_old_heartbeat_never_replaces_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that beats again is held up between reading and writing while the run ends."""
    folder = RunFolder(tmp_path)
    folder.heartbeat(4, 5, "training")
    plain, begun, ended = folder._replace, threading.Event(), threading.Event()

    def slow(name: str, content: Mapping[str, object], *, durable: bool = True) -> None:
        if threading.current_thread() is beating:
            begun.set()
            ended.wait(0.2)
        plain(name, content, durable=durable)

    monkeypatch.setattr(folder, "_replace", slow)
    beating = threading.Thread(target=folder.beat_again)
    beating.start()
    assert begun.wait(10)
    folder.heartbeat(5, 5, "finished")
    ended.set()
    beating.join()
    assert json.loads((tmp_path / "heartbeat.json").read_text())["state"] == "finished"
