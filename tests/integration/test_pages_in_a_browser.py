"""The pages that tuner writes, in a browser: the report of a real run, the same report to pass on, and a contact sheet.

`make screenshots` trains for longer and writes the pictures of the docs on the way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from integration.browser import SCREENSHOTS, Opened, browser, find_browser, opened
from integration.project import Project, add_damaged_clip
from integration.scenery import SCENES, write_scene
from tuner.cli.main import run as tuner
from tuner_ltxvideo2.tiny import TinyPaths

STEPS = 160 if SCREENSHOTS else 12
EVERY = STEPS // 4
FRAMES = 17
PHONE = 390
"""Pixels across."""
PLAYERS = """() => [...document.querySelectorAll("video")].map((player) => ({
  ready: player.readyState, seconds: player.duration, width: player.videoWidth, height: player.videoHeight, muted: player.muted,
  error: player.error && player.error.message, sound: player.webkitAudioDecodedByteCount, poster: player.poster.slice(0, 15),
}))"""
ALL_PLAY = """() => [...document.querySelectorAll("video")].every((player) =>
  player.readyState >= 3 && !player.paused && player.currentTime > 0 && player.webkitAudioDecodedByteCount > 0)"""
CURVES = """() => [...document.querySelectorAll("[data-chart] .plot")].map((plot) =>
  [...plot.querySelectorAll("path[stroke-width='1.8']")].map((line) => line.getTotalLength()))"""


@pytest.fixture(scope="module")
def program() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Path:
    """The folder of a run with samples, curves and a held-out loss."""
    find_browser()  # before a run is trained for nobody
    folder = tmp_path_factory.mktemp("watched")
    for name in SCENES:
        write_scene(folder / ("exam" if name == "sunset" else "clips"), name, frames=FRAMES)
    entries = [{"id": "scenes", "type": "local", "dataset_type": "video", "instance_data_dir": "clips", "caption_strategy": "textfile"},
               {"id": "exam", "dataset_type": "eval", "instance_data_dir": "exam"}]  # fmt: skip
    (folder / "data.json").write_text(json.dumps([{**entry, "video": {"num_frames": FRAMES}} for entry in entries]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert Project(folder, tiny).train(
            data=None, data_backend_config="data.json", cache_dir="cache", output_dir="output/scenes", resolution=96, lora_rank=16,
            max_train_steps=STEPS, checkpoint_step_interval=STEPS // 2, lr_scheduler="cosine", lr_warmup_steps=EVERY // 4,
            validation_disable=False, validation_prompt="A red balloon over green hills. A burner hisses.", validation_resolution="96x64",
            validation_num_video_frames=FRAMES, validation_num_inference_steps=2, validation_guidance=1,
            validation_step_interval=EVERY, eval_timesteps=1,
        ) == 0  # fmt: skip
    return folder / "output" / "scenes"


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contact sheet of clips that are fine, and of one of each kind of trouble."""
    find_browser()
    folder = tmp_path_factory.mktemp("looked-at")
    for name in SCENES:
        write_scene(folder / "my_clips", name, frames=5 if name == "boat" else 25, sound=name != "snowfall")
    for end in (".mp4", ".txt"):
        shutil.copy(folder / f"my_clips/sunset{end}", folder / f"my_clips/sunset (1){end}")
    add_damaged_clip(folder / "my_clips", "torn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tuner(["inspect", "--family", "ltxvideo2", "--data", "my_clips", "--resolution", "96", "--html", "sheet.html"]) == 0
    return folder / "sheet.html"


def fits(shown: Opened) -> None:
    """Nothing hangs over the window's side, no word is broken, and nobody complained."""
    assert shown.overhang <= 0 and shown.broken_words == [] and shown.complaints == [] and shown.outside == []


def test_what_a_page_does_wrong_is_noticed(program: Browser, tmp_path: Path) -> None:
    """The checks below are worth something."""
    outside = "http://outside.example/picture.png"
    (tmp_path / "page.html").write_text(
        f"<table style='width: 9px; word-break: break-all'><td>unbroken</table><p style='width: 3000px'>wide</p><img src='{outside}'>"
        "<script>console.warn('careful'); setTimeout(() => { throw new Error('lost') })</script>"
    )
    with opened(program, tmp_path / "page.html") as shown:
        assert shown.outside == [outside] and shown.overhang > 1000 and "unbroken" in shown.broken_words
        assert {"warning: careful"} <= set(shown.complaints) and any("lost" in words for words in shown.complaints)
        assert any("ERR_NAME_NOT_RESOLVED" in words for words in shown.complaints)


def test_without_a_browser_tests_are_skipped_but_not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser({"CI": ""})
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser({"CI": "true", "WITHOUT_BROWSER": "1"})
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_browser({"CI": "true"})


def test_a_report_draws_its_curves_and_plays_its_samples(program: Browser, run: Path) -> None:
    with opened(program, run / "report.html") as shown:
        fits(shown)
        shown.picture("report.png", shown.page.locator(".chart").nth(1))
        assert shown.requests == [(run / "report.html").as_uri()]  # samples are fetched when they are played
        drawn = shown.ask(CURVES)
        assert len(drawn) == shown.count("figure.chart") >= 8 and all(drawn)
        assert min(drawn[0] + drawn[1]) > 100  # pixels; the losses, of which there are many in any run
        plot = shown.page.locator(".plot").first
        plot.hover()
        assert shown.page.locator(".reading").first.inner_text().startswith("step ")
        shown.page.get_by_label("Smoothing").fill("0.5")
        assert shown.ask(CURVES)[0] != drawn[0]
        shown.page.locator(".legend button").first.click()
        assert len(shown.ask(CURVES)[0]) == len(drawn[0]) - 1

        samples = sorted(run.glob("validation/step_*/*.mp4"))
        assert len(samples) == shown.count("video") == 5
        shown.page.get_by_role("button", name="Play all of").click()
        shown.wait_for(ALL_PLAY)
        players = shown.ask(PLAYERS)
        assert [player["muted"] for player in players] == [True] * 4 + [False]
        for player in players:
            assert player["seconds"] == pytest.approx(FRAMES / 25, abs=0.05)  # sound comes in frames of 1,024 samples
            assert (player["width"], player["height"], player["error"]) == (96, 64, None) and player["poster"] == "data:image/jpeg"
        assert set(shown.requests) == {(run / "report.html").as_uri(), *(sample.as_uri() for sample in samples)}
        fits(shown)


def test_a_report_fits_a_phone_and_the_night(program: Browser, run: Path) -> None:
    with opened(program, run / "report.html", width=PHONE, height=844, dark=True) as shown:
        assert shown.paper < 60
        for summary in shown.page.locator("summary").all():
            summary.click()
        fits(shown)
    with opened(program, run / "report.html", width=320) as shown:
        assert shown.paper > 200
        fits(shown)


def test_a_report_to_pass_on_plays_from_itself(program: Browser, run: Path, tmp_path: Path) -> None:
    assert tuner(["report", str(run), "--output", str(tmp_path / "alone.html")]) == 0
    with opened(program, tmp_path / "alone.html") as shown:
        shown.page.locator("video").last.focus()
        shown.page.keyboard.press("Space")
        shown.wait_for("() => document.querySelectorAll('video')[4].currentTime > 0")
        assert [address for address in shown.requests if not address.startswith("data:")] == [(tmp_path / "alone.html").as_uri()]
        fits(shown)


def test_a_contact_sheet_shows_every_clip(program: Browser, sheet: Path) -> None:
    with opened(program, sheet, height=1100) as shown:
        fits(shown)
        cards = shown.page.locator(".card")
        for card in reversed(cards.all()):
            card.scroll_into_view_if_needed()
        shown.wait_for("() => [...document.images].every((picture) => picture.complete && picture.naturalWidth > 0)")
        shown.ask("() => window.scrollTo(0, 0)")
        shown.picture("contact-sheet.png", cards.nth(5))
        decoded = len(SCENES) + 1
        assert cards.count() == decoded + 1 and shown.count("img") == 3 * decoded and shown.count("svg.wave") == decoded
        shown.page.get_by_label("show only").check()
        assert [card.locator("h3").inner_text() for card in cards.all() if card.is_visible()] == [
            "boat.mp4", "snowfall.mp4", "sunset.mp4", "torn.mp4",
        ]  # fmt: skip
        assert [address for address in shown.requests if not address.startswith("data:")] == [sheet.as_uri()]
        fits(shown)
    for width, dark in ((PHONE, True), (320, False)):
        with opened(program, sheet, width=width, dark=dark) as shown:
            assert (shown.paper < 60) == dark
            fits(shown)
