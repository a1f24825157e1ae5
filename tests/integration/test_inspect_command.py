"""`tuner inspect` from the command line: rows, totals that add up, the object, the contact sheet, exit codes. No weights are there."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.clips import tone, write_sound
from integration.project import add_clip, add_damaged_clip
from tuner.cli import inspect as command
from tuner.cli.main import run
from tuner.component import Component
from tuner.config.options import Options
from tuner.config.resolve import resolve
from tuner.data.buckets import Bucket
from tuner.data.items import Item, Status, Verdict
from tuner.data.manifest import Manifest
from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.inspect.contact_sheet import contact_sheet
from tuner.inspect.inspection import find_family, inspect
from tuner.plugins.loader import load_plugins
from tuner_ltxvideo2.family import LTX2Family

Capture = pytest.CaptureFixture[str]
QUICK = ("--family", "ltxvideo2", "--resolution", "64")
NASTY = "</script><script>alert(1)</script> \"quoted\" & 'more'"


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two good clips, and one of each kind of trouble."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clips"
    add_clip(folder, "good", frames=20)
    add_clip(folder, "<b>", frames=12, sound=False, caption=NASTY)
    add_clip(folder, "short", frames=5)
    add_damaged_clip(folder, "torn")
    add_clip(folder, "uncaptioned", frames=9)
    (folder / "uncaptioned.txt").unlink()
    (folder / "not\na film.mp4").write_text("text")
    return folder


def tuner(*arguments: object) -> int:
    return run(["inspect", *QUICK, *(str(argument) for argument in arguments)])


def asked(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert tuner("--json", *arguments) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def adds_up(answer: dict[str, Any]) -> None:
    """Every number of it is the sum of others."""
    statuses = ("used", "skipped", "failed", "held_out")
    assert answer["found"] == sum(answer[status] for status in statuses)
    for name in ("found", *statuses):
        assert answer[name] == sum(entry[name] for entry in answer["datasets"])
    counted = Counter((row["status"], row["reason"]) for row in answer["files"] if row["status"] in ("skipped", "failed"))
    assert counted == {(row["status"], row["reason"]): row["count"] for row in answer["reasons"]}
    assert Counter(row["status"].replace(" ", "_") for row in answer["files"]) == {s: answer[s] for s in statuses if answer[s]}
    assert answer["batches_per_epoch"] == sum(bucket["batches"] for bucket in answer["buckets"])
    trained = Counter(row["use"]["bucket"] for row in answer["files"] if row["use"] and row["status"] == "used")
    items = Counter[str]()
    for bucket in answer["buckets"]:
        items[bucket["bucket"]] += bucket["items"]
        assert bucket["turns"] == (bucket["batches"] - 1) * answer["batch_size"] + bucket["last_batch"]
    assert items == trained
    assert answer["remarks"] == Counter(remark["kind"] for row in answer["files"] for remark in row["remarks"])


def test_rows_and_totals_for_people(clips: Path, capsys: Capture) -> None:
    assert tuner("--data", "clips", "--train_batch_size", "2") == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert re.fullmatch(r"data +good\.mp4 +96x64 +25 +20 -> 17 +64x64@17 +2 ch 16 kHz -\d+\.\d LUFS +5 +used", lines[2])
    assert r"not\na film.mp4" in shown.out and "failed: cannot be decoded: Invalid data found" in shown.out
    assert "failed: the frame at 0.600 s is damaged" in shown.out and "skipped: too short: 5 of 9 frames" in shown.out
    assert "found 6 = used 2 + skipped 1 + failed 3" in lines
    assert "family     ltxvideo2, video + audio" in lines
    assert "batches    2 an epoch, of 2; in 2 of 2 buckets the last is incomplete" in lines
    assert lines[-1] == "training would not start: 1 clips have no usable caption"
    assert shown.err == "" and sorted(path.name for path in clips.parent.iterdir()) == ["clips"]
    assert tuner("--data", "clips", "--problems") == 0
    assert "good.mp4" not in (problems := capsys.readouterr().out) and "torn.mp4" in problems and "found 6 =" in problems


def test_the_object_adds_up_and_names_no_path_that_nobody_wrote(clips: Path, capsys: Capture) -> None:
    (clips / "shut.mp4").write_bytes((clips / "good.mp4").read_bytes())
    (clips / "shut.txt").mkdir()
    answer = asked(capsys, "--data", "clips", "--train_batch_size", "2")
    adds_up(answer)
    assert str(clips.parent) not in json.dumps(answer) and answer["datasets"][0]["folder"] == "clips"
    rows = {row["file"]: row for row in answer["files"]}
    good = rows["good.mp4"]
    assert good["media"] == {"kind": "video", "width": 96, "height": 64, "fps": 25.0, "frames": 20, "seconds": 0.8, "codec": "h264"}
    assert good["use"]["bucket"] == "64x64@17" and good["use"]["turns"] == 1 and good["caption"]["words"] == 5
    assert good["sound"]["measured"] and -12 < good["sound"]["loudness"] < -6 and good["sound"]["peak"] == pytest.approx(-8, abs=0.5)
    assert rows["<b>.mp4"]["caption"]["text"] == NASTY and rows["<b>.mp4"]["sound"] is None
    assert rows["shut.mp4"]["detail"].lower() == "shut.txt cannot be read: is a directory"
    assert answer["streams"] == ["video", "audio"] and answer["training_would_not_start"] == "2 clips have no usable caption"
    problems = asked(capsys, "--data", "clips", "--problems")
    assert {row["file"] for row in problems["files"]} == rows.keys() - {"good.mp4", "<b>.mp4"} and problems["found"] == 7


def test_decoding_can_be_left_out(clips: Path, capsys: Capture) -> None:
    rows = {row["file"]: row for row in asked(capsys, "--data", "clips", "--quick")["files"]}
    assert rows["torn.mp4"]["status"] == "used"  # its header looks well
    assert not rows["good.mp4"]["sound"]["measured"] and rows["good.mp4"]["sound"]["loudness"] is None


def test_every_kind_of_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    for name, pitch in (("cat", 1), ("dog", 2)):
        add_clip(Path("films"), name, frames=9, sound=False)
        add_clip(Path("before"), name, frames=9, sound=False)
        for folder in ("photos", "where", "voices", "exam"):
            Path(folder).mkdir(exist_ok=True)
        noise = np.random.default_rng(pitch).integers(0, 255, (64, 96, 3), np.uint8)
        for folder in ("photos", "where", "exam"):
            Image.fromarray(noise ^ len(folder)).save(Path(folder, f"{name}.png"))
        write_sound(Path("voices", f"{name}.wav"), tone(1.2, 16000, 1, [(0, 0.6 * pitch)]), 16000, "pcm_s16le")
        for folder in ("photos", "voices", "exam"):
            Path(folder, f"{name}.txt").write_text(f"{folder} of a {name}")
    kinds: dict[str, dict[str, object]] = {
        "films": {"video": {"num_frames": 9}, "s2v_datasets": "voices", "conditioning_data": ["before", "where"], "resolution": 64},
        "photos": {"dataset_type": "image", "repeats": 3, "probability": 0.5},
        "voices": {"dataset_type": "audio", "audio": {"audio_only": True, "duration_interval": 0.5}},
        "before": {"dataset_type": "conditioning", "conditioning_type": "reference"},
        "where": {"dataset_type": "conditioning", "conditioning_type": "mask"},
        "exam": {"dataset_type": "eval"},
    }
    Path("d.json").write_text(json.dumps([{"id": name, "instance_data_dir": name, **keys} for name, keys in kinds.items()]))
    answer = asked(capsys, "--data_backend_config", "d.json", "--train_batch_size", "3")
    adds_up(answer)
    assert (answer["found"], answer["used"], answer["held_out"]) == (12, 10, 2)
    rows = {(row["dataset"], row["file"]): row for row in answer["files"]}
    film, photo, voice = rows["films", "cat.mp4"], rows["photos", "cat.png"], rows["voices", "cat.wav"]
    assert film["use"]["files"] == ["sound voices: cat.wav", "reference before: cat.mp4", "mask where: cat.png"]
    assert film["sound"]["source"] == "voices: cat.wav" and film["sound"]["channels"] == 1 and film["sound"]["measured"]
    assert rows["before", "cat.mp4"]["belongs_to_others"] and rows["before", "cat.mp4"]["use"] is None
    assert photo["use"]["turns"] == 4 and voice["use"]["bucket"] == "1 s of sound" and rows["exam", "cat.png"]["use"]["turns"] == 0
    buckets = {bucket["kind"]: bucket for bucket in answer["buckets"]}
    assert [c["role"] for c in buckets["video"]["companions"]] == ["mask", "reference"]
    assert [buckets["image"][name] for name in ("items", "turns", "batches", "last_batch")] == [2, 4, 2, 1]
    assert tuner("--data_backend_config", "d.json", "--html", "sheet.html") == 0
    shown = capsys.readouterr().out
    assert "  photos: found 2 = used 2 + skipped 0 + failed 0; each 4 times an epoch; 0.5 of that in each epoch" in shown
    assert "  exam: found 2 = used 0 + skipped 0 + failed 0 + held out 2" in shown
    assert "voices: cat.wav 1 ch 16 kHz" in shown and "1.20 s -> 1 s" in shown and "used with other files" in shown
    page = Page(Path("sheet.html").read_text())
    assert sum("mask of cat.mp4" in picture["alt"] for picture in page.all("img")) == 3  # it holds still for nine frames


# --- the contact sheet -------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Elements with attributes; the text of each heading of a card."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.names: list[str] = []
        self.text: list[str] = []
        self._last = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._last = tag
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._last == "h3":
            self.names.append(data)
        self._last = ""

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_contact_sheet_shows_every_clip_and_fetches_nothing(clips: Path, capsys: Capture) -> None:
    odd = os.fsdecode(b"odd \xff.mp4")
    try:
        (clips / odd).write_bytes((clips / "good.mp4").read_bytes())
    except OSError:  # a file system that takes no such name
        odd = "odd.mp4"
        (clips / odd).write_bytes((clips / "good.mp4").read_bytes())
    (clips / odd).with_suffix(".txt").write_text("the same again")
    assert tuner("--data", "clips", "--html", "sheet.html", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["remarks"] == {"duplicate": 1} and told.err == "contact sheet: sheet.html\n"
    text = Path("sheet.html").read_text()
    page = Page(text)
    other = odd.replace("\udcff", "\\udcff")
    assert page.names == ["<b>.mp4", "good.mp4", "not\na film.mp4", other, "short.mp4", "torn.mp4", "uncaptioned.mp4"]
    assert not page.all("script") and not page.all("b") and NASTY in page.text
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "style", "data", "poster"):
            assert name not in attributes or attributes[name].startswith("data:image/"), (tag, name)
    assert "http:" not in text and "https:" not in text and "url(" not in text and str(clips.parent) not in text
    # Three pictures of each clip that can be decoded, used or not, and a waveform where there is sound.
    owners = Counter(picture["alt"].partition(" frame of ")[2] for picture in page.all("img"))
    assert owners["good.mp4"] == owners["<b>.mp4"] == owners["short.mp4"] == owners["uncaptioned.mp4"] == 3 and "torn.mp4" not in owners
    assert sum("LUFS" in drawing["aria-label"] for drawing in page.all("svg")) == 4
    assert all(len(picture["src"]) < 12_000 and picture["loading"] == "lazy" for picture in page.all("img"))
    assert "prefers-color-scheme: dark" in text and [card["class"] for card in page.all("article")].count("card") == 5


def test_a_thousand_clips_make_a_page_that_opens(clips: Path) -> None:
    registry = load_plugins()
    settings = resolve(registry.option_types, flags={"data": "clips", "resolution": 512, "model_family": "ltxvideo2"}, environ={})
    one = inspect(registry, settings, thumbnails=100)
    times = 1000 // len(one.rows) + 1
    many = contact_sheet(replace(one, rows=one.rows * times, looks=one.looks * times))
    assert len(Page(many).names) == len(one.rows) * times > 1000 and len(many) < 20_000_000


# --- exit codes --------------------------------------------------------------------------------------------------
def test_strict_is_an_error_for_anything_that_is_not_flawless(clips: Path, capsys: Capture) -> None:
    assert tuner("--data", "clips", "--strict") == 4
    shown = capsys.readouterr()
    assert "found 6 =" in shown.out and "strict: strict is on, and 1 skipped, 3 failed" in shown.err
    add_clip(clips.parent / "fine", "one", frames=9)
    assert tuner("--data", "fine", "--strict") == 0
    (clips.parent / "fine" / "two.mp4").write_bytes((clips.parent / "fine" / "one.mp4").read_bytes())
    (clips.parent / "fine" / "two.txt").write_text("the same")
    capsys.readouterr()
    assert asked(capsys, "--data", "fine", "--strict", code=4)["remarks"] == {"duplicate": 1}


def test_what_cannot_be_asked_is_said_before_anything_is_read(clips: Path, capsys: Capture) -> None:
    (clips.parent / "empty").mkdir()
    for arguments, code, words in (
        (["--data", "clips", "--html", "clips/good.mp4"], 2, "html: the contact sheet is an .html file (got 'clips/good.mp4')"),
        (["--data", "clips", "--html", "nowhere/sheet.html"], 2, "html: there is no folder to write the contact sheet to"),
        (["--data", "clips", "--html", "sheet.html", "--quick"], 2, "--quick decodes none"),
        ([], 2, "data_backend_config: no dataset was given"),
        (["--data", "nowhere"], 4, "these folders do not exist"),
        (["--data", "empty"], 4, "has no clips"),
        (["--data", "clips", "--family", "ltxvideo3"], 2, "ltxvideo2"),
        (["--data", "clips", "--resolutoin", "64"], 2, "resolutoin"),
    ):
        assert tuner(*arguments) == code, arguments
        assert words in capsys.readouterr().err
    assert not (clips.parent / "sheet.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(clips: Path, capsys: Capture) -> None:
    long = clips.parent / f"{'x' * 250}.html"
    assert tuner("--data", "clips", "--html", long) == 9
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in clips.parent.iterdir() if path.name.startswith(".")] == []


def test_progress_is_shown_on_a_terminal(clips: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "is_interactive", lambda console: True)
    assert tuner("--data", "clips") == 0
    told = capsys.readouterr()
    assert "examining files" in told.err and "decoding files" in told.err and "decoding" not in told.out


# --- the family --------------------------------------------------------------------------------------------------
def test_the_only_family_is_taken_and_one_of_several_must_be_chosen() -> None:
    def found(*names: str) -> str:
        factory = f"{LTX2Family.__module__}:{LTX2Family.__name__}"
        components = [Component(name, "for a test", LTX2Family.options_type, factory) for name in names]
        zoo = type("Zoo", (), {"tuner_register_families": staticmethod(hookimpl(lambda: components))})
        registry = load_plugins({"TUNER_PLUGINS": "builtins,zoo"}, [("zoo", zoo)])
        return find_family(registry, resolve(registry.option_types, environ={}))[0]

    assert found("tiger") == "tiger"
    with pytest.raises(ConfigError, match="none was chosen") as caught:
        found("tiger", "lynx")
    assert caught.value.where == "model_family" and "installed: tiger, lynx" in str(caught.value)
    with pytest.raises(ConfigError, match="none: install one"):
        found()
    assert issubclass(LTX2Family.options_type, Options) and LTX2Family.caption_tokens == 1024


# --- totals ------------------------------------------------------------------------------------------------------
def test_totals_of_any_manifest_add_up(clips: Path) -> None:
    registry = load_plugins()
    settings = resolve(registry.option_types, flags={"data": "clips", "model_family": "ltxvideo2"}, environ={})
    one = inspect(registry, settings, decode=False)
    rng = np.random.default_rng(0)
    for _ in range(20):
        verdicts = tuple(_verdicts(rng, int(rng.integers(1, 30))))
        manifest = Manifest(verdicts, (), Path("cache"), LTX2Family.geometry)
        rows = tuple(replace(one.rows[0], status=verdict.status, reason=verdict.reason, remarks=()) for verdict in verdicts)
        inspection = replace(one, manifest=manifest, rows=rows, looks=(None,) * len(rows), notices=(), stops="")
        text = command._totals(inspection)
        found = re.fullmatch(r"found (\d+) = used (\d+) \+ skipped (\d+) \+ failed (\d+)(?: \+ held out (\d+))?", text[0])
        assert found
        total, *parts = (int(number or 0) for number in found.groups())
        assert total == sum(parts) == len(verdicts)
        reasons = [int(line.split()[0]) for line in text if re.match(r"  \d+ (?:skipped|failed): ", line)]
        assert sum(reasons) == parts[1] + parts[2]
        assert inspection.flawless == (parts[1] + parts[2] == 0)


def _verdicts(rng: np.random.Generator, count: int) -> Iterator[Verdict]:
    statuses: tuple[Status, ...] = ("used", "skipped", "failed", "held out")
    for number in range(count):
        status = statuses[int(rng.integers(4))]
        item = Item("data", Path(f"{number}"), f"{number}", "", Bucket(64, 64, 9), 25.0, False, False, False, 0, Path("cache"))
        left_out = status in ("skipped", "failed")
        yield Verdict("data", item.path, status, f"reason {rng.integers(3)}" if left_out else "", item=None if left_out else item)
