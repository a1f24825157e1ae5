"""report.html: everything that a run wrote is there, nothing is fetched, nothing is executed but the page's own script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from core.watched import NASTY, SECRET, Page, metrics_row, small_clip, write_run
from tuner.cli.main import run as tuner
from tuner.train.run import RunFolder
from tuner.watch import report
from tuner.watch import samples as sample_grid
from tuner.watch.charts import ROWS, charts, shortened
from tuner.watch.hiding import hidden, shown_value
from tuner.watch.history import read_history
from tuner.watch.report import part_of_page, render, write_report
from tuner.watch.series import bucketed, gather

SCRIPT = Path(str(report.__file__)).with_name("report.js")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "waves"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page(render(read_history(made)))


# --- what the page holds -----------------------------------------------------------------------------------------
def test_nothing_is_fetched_but_files_beside_the_page(page: Page, made: Path) -> None:
    for address in page.addresses():
        assert address.startswith(("data:", "#", "validation/")), address
        if address.startswith("validation/"):
            assert (made / address.replace("%20", " ")).is_file()
    assert not [style for style in page.raw["style"] if "url(" in style or "@import" in style]
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {name for name, _ in page.elements}


def test_only_the_pages_own_script_may_run(page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    scripts = [text for text, attributes in zip(page.raw["script"], page.named("script"), strict=True) if "type" not in attributes]
    assert scripts == [part_of_page("report.js")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "http" not in policy


def test_texts_of_others_are_text(page: Page) -> None:
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert len(page.named("img")) == 1 and page.named("img")[0]["src"].startswith("data:image/jpeg")
    assert page.text.count(" ".join(NASTY.split())) >= 4  # notice, caption, prompt, setting
    assert "<b>.mp4" in page.text and not page.named("b")


def test_secrets_and_folders_of_the_machine_are_not_there(made: Path) -> None:
    text = render(read_history(made))
    assert SECRET not in text and str(made.resolve()) not in text and "/data/somebody" not in text and "private clips" not in text
    assert "…/file.mp4" in text and "…/here" in text


def test_every_curve_is_there_with_its_numbers(page: Page) -> None:
    drawn = {chart["title"]: chart for chart in page.data["charts"]}  # type: ignore[index, union-attr, attr-defined]
    assert list(drawn) == [
        "Loss", "Held-out loss", "Loss of video by noise level", "Learning rate", "Gradient norm", "Seconds a step", "Memory (GPU)",
        "alignment",
    ]  # fmt: skip
    loss = {series["name"]: series for series in drawn["Loss"]["series"]}
    assert list(loss) == ["total", "video", "audio"]
    assert loss["total"]["x"] == list(range(1, 21)) and loss["total"]["y"] == [float(f"{1 / step:.5g}") for step in range(1, 21)]
    assert loss["audio"]["x"] == list(range(1, 21, 2)) and "lo" not in loss["audio"]
    assert drawn["Held-out loss"]["series"][0] == {"name": "video", "x": [0, 20], "y": [0.5, 20.5]}
    assert drawn["Memory (GPU)"]["limit"] == 24 and drawn["Memory (GPU)"]["series"][1]["y"] == [12] * 20
    assert [series["name"] for series in drawn["Loss of video by noise level"]["series"]] == [
        "sigma 0.00 to 0.75", "sigma 0.25 to 0.75", "sigma 0.50 to 0.75",
    ]  # fmt: skip
    assert len([1 for attributes in page.named("figure") if "data-chart" in attributes]) == len(drawn)


def test_samples_stand_in_a_grid_and_play(page: Page, made: Path) -> None:
    videos = page.named("video")
    assert [video["aria-label"] for video in videos] == ["first at step 0", "first at step 20"]
    assert all("controls" in video and video["preload"] == "none" and video["poster"].startswith("data:image/jpeg") for video in videos)
    assert [audio["aria-label"] for audio in page.named("audio")] == ["noise at step 20"]
    assert [head["data-row"] for head in page.named("th") if "data-row" in head] == ["first", "noise"]
    assert "failed: no memory at ./validation" in page.text and "text to video" in page.text


def test_dataset_settings_and_events_are_there(page: Page) -> None:
    for words in ("found 3 = used 2 + skipped 1 + failed 0", "1 clips with sound", "too short", "64x64@9", "hum.wav", "held out",
                  "2 repeats", "2 more items are not shown", "checkpoint-20", "2 keys at their defaults", "Some GPU", "tuner-x 1.2",
                  "finished", "20 of 20", "video 0.0375", "Peak memory GPU: 12.0 of 24.0 GiB",
                  "step: 20, losses: video 20.5 audio 0.25"):  # fmt: skip
        assert words in page.text, words
    assert re.search(r"seed 42 file", page.text) and re.search(r"lora_rank 16 default", page.text)
    assert page.named("svg")[0]["aria-label"] == "waveform of hum.wav"


def test_tables_take_the_place_of_curves_without_a_script(page: Page) -> None:
    assert "noscript" in {name for name, _ in page.elements}
    assert re.search(r"step total video audio 1 1 0.75 0.25 2 0.5 0.375", page.text)
    assert {"controls"} <= {attributes.get("id") for attributes in page.named("div")}
    assert all("hidden" in attributes for attributes in page.named("div") if attributes.get("id") == "controls")


def test_a_page_of_an_empty_or_damaged_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Page(render(read_history(tmp_path)))
    run.event("started", notices="no list")
    for name in ("run.json", "config.resolved.json", "dataset.json", "heartbeat.json"):
        (tmp_path / name).write_text("[1, 2")
    rows = ['{"step": 1, "loss": null}', '{"step": "x", "loss": 1}', "[3]", "nonsense", '{"step": 2, "loss": 0.5}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    (tmp_path / "events.jsonl").write_text('{"kind": "sample", "step": 1, "path": "../../etc/passwd"}\n{"kind": "heldout"}\n{"kind": 7}\n')
    page = Page(render(read_history(tmp_path)))
    assert page.data["charts"][0]["series"] == [{"name": "total", "x": [2], "y": [0.5]}]  # type: ignore[index]
    assert "passwd" not in "".join(page.addresses())
    odd = {"clips": [{"picture": "%%", "wave": [1, [2]], "repeats": "x"}], "buckets": 3, "items": "n"}
    (tmp_path / "dataset.json").write_text(json.dumps(odd))
    Page(render(read_history(tmp_path)))


def test_samples_that_are_damaged_or_gone(tmp_path: Path) -> None:
    run = write_run(tmp_path, samples=False)
    small_clip(tmp_path / "validation" / "step_7" / "plain.mp4")
    (tmp_path / "validation" / "step_7" / "broken.mp4").write_bytes(b"no clip")
    for name in ("plain", "broken", "lost"):
        run.event("sample", step=7, path=f"validation/step_7/{name}.mp4", prompt="p", label=name, mode="i2v", seconds=1.0)
    page = Page(render(read_history(tmp_path)))
    videos = {video["src"]: video for video in page.named("video")}
    assert set(videos) == {"validation/step_7/plain.mp4", "validation/step_7/broken.mp4"}
    assert "poster" in videos["validation/step_7/plain.mp4"] and "poster" not in videos["validation/step_7/broken.mp4"]
    assert "the file is gone" in page.text


def test_a_run_in_a_folder_that_was_used_before_shows_itself_only(tmp_path: Path) -> None:
    run = write_run(tmp_path, samples=False)  # until step 20
    time.sleep(0.002)  # times are in milliseconds
    for first in (0, 3):  # begun anew, then resumed
        run.event("started", notices=[f"from {first}"])
        run.event("training", from_step=first)
        run.event("heldout", step=first, losses={"video": 1.0 + first}, items=4)
        run.pace(first + 1, {"seconds": 9.0})
    history = read_history(tmp_path)
    assert history.heldout["video"].steps == (0, 3) and history.pace["seconds"].steps == (1, 4)
    assert history.status.checkpoint == "" and history.status.heldout == {"video": 4.0}
    text = Page(render(history)).text
    assert "from 0" in text and "from 3" in text and "checkpoint-20" not in text


# --- bounds ------------------------------------------------------------------------------------------------------
def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    run = write_run(tmp_path, samples=False)
    lines = "".join(json.dumps({"step": step, **metrics_row(step)}) + "\n" for step in range(1, 40_001))
    (tmp_path / "metrics.jsonl").write_text(lines)
    for step in range(2000):
        run.event("checkpoint", step=step, path=f"checkpoint-{step}")
    text = render(read_history(tmp_path))
    assert len(text) < 1_000_000 < len(lines)
    page = Page(text)
    series = page.data["charts"][0]["series"][0]  # type: ignore[index]
    assert 500 <= len(series["x"]) <= 1000 and {"lo", "hi"} <= set(series)
    assert len(page.named("tr")) < 300 + 10 * (ROWS + 10) and "events in between are in events.jsonl" in page.text


@pytest.mark.parametrize("most", [1, 7, 100])
def test_buckets_keep_means_and_extremes(most: int) -> None:
    generator = random.Random(most)
    steps = sorted(generator.sample(range(5000), 800))
    values = [generator.gauss(0, 1) for _ in steps]
    curve = bucketed(steps, values, most)
    assert curve is not None and len(curve.steps) <= most
    width = next(2**k for k in range(20) if max(steps) // 2**k - min(steps) // 2**k < most)
    wanted: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        wanted.setdefault(step // width, []).append(value)
    assert curve.steps == tuple(index * width + (width - 1) / 2 for index in wanted)
    assert curve.mean == pytest.approx([sum(group) / len(group) for group in wanted.values()], abs=1e-12)
    assert curve.low == tuple(map(min, wanted.values())) and curve.high == tuple(map(max, wanted.values()))


def test_gather_takes_numbers_only_in_any_order() -> None:
    rows = [{"step": 2, "a": 4}, {"step": 1, "a": 2.0, "b": math.nan, "c": "text", "d": True}, {"step": None, "a": 9}, {"a": 9}]
    curves = gather(rows)
    assert set(curves) == {"a"} and curves["a"].steps == (1, 2) and curves["a"].mean == (2, 4)


def test_the_grid_keeps_the_first_and_last_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(0, 101, 2):
        run.event("sample", step=step, path="", prompt="p", label="one", mode="t2v")
        run.event("sample", step=step, path="", prompt="q", label="two", mode="t2v")
    monkeypatch.setattr(sample_grid, "CELLS", 10)
    labels, steps = sample_grid.chosen(read_history(tmp_path).samples)
    assert labels == ["one", "two"] and len(steps) == 5 and (steps[0], steps[-1]) == (0, 100)
    assert "Not shown here: 46 steps" in Page(render(read_history(tmp_path))).text


def test_charts_are_bounded(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics(1, {f"many/{index}": 1.0 for index in range(30)} | {f"kind{index}": 1.0 for index in range(90)})
    found = charts(read_history(tmp_path))
    assert len(found) == 40 and max(len(chart.curves) for chart in found) == 12
    assert next(chart for chart in found if chart.title == "many").left_out == 18


def test_numbers_are_short() -> None:
    assert [shortened(value) for value in (0.123456789, 1e-7 / 3, 20.0, 123456.7, -2.5)] == [0.12346, 3.3333e-08, 20, 123460, -2.5]
    assert isinstance(shortened(20.0), int)


# --- what is hidden ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "wanted"), [
    ("in /data/me/clips/a.mp4: bad", "in …/a.mp4: bad"), ("D:\\clips\\me\\a.mp4 gone", "…/a.mp4 gone"), ("(/tmp/x/y)", "(…/y)"),
    ("video/audio and 1/2", "video/audio and 1/2"), ("see https://a.example/b/c/d", "see https://a.example/b/c/d"), ("/tmp", "/tmp"),
    ("validation/step_1/a.mp4", "validation/step_1/a.mp4"),
    (f"token {SECRET}", "token ***"), ("https://me:pw@host/x/y", "https://***@host/x/y"), ("~/a/b", "~/a/b"),
])  # fmt: skip
def test_paths_and_secrets_are_hidden(text: str, wanted: str) -> None:
    assert hidden(text) == wanted


def test_settings_in_one_line() -> None:
    assert shown_value("/data/with spaces/my clips") == "…/my clips"
    assert shown_value({"path": "/data/x/y", "n": 1}) == '{"path": "…/y", "n": 1}'
    assert [shown_value(value) for value in (None, True, 512.0, 1e-4, ["a"], "")] == ["", "true", "512", "0.0001", '["a"]', ""]
    assert shown_value("secret", "hub_token") == "***"


# --- the command -------------------------------------------------------------------------------------------------
def test_the_command_writes_the_page_anew(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner(["report", str(made.parent)]) == 0
    assert capsys.readouterr().out.strip() == str(made / "report.html")
    assert len(Page((made / "report.html").read_text()).named("video")) == 2
    assert not [path for path in made.iterdir() if path.name.startswith(".report")]


def test_a_page_to_pass_on_holds_its_samples(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuner(["report", str(made), "--output", str(tmp_path / "alone.html")]) == 0
    page = Page((tmp_path / "alone.html").read_text())
    clip = (made / "validation/step_20/own name.mp4").read_bytes()
    assert all(address.startswith(("data:", "#")) for address in page.addresses())
    assert page.named("video")[1]["src"] == "data:video/mp4;base64," + base64.b64encode(clip).decode()
    room = len(clip) + (made / "validation/step_20/noise.wav").stat().st_size
    monkeypatch.setattr(sample_grid, "INLINE_BYTES", room + 10)  # the newest come first; there is no room for the one of step 0
    assert tuner(["report", str(made), "--output", str(tmp_path / "alone.html")]) == 0
    page = Page((tmp_path / "alone.html").read_text())
    assert [video["aria-label"] for video in page.named("video")] == ["first at step 20"] and "too large for this page" in page.text


def test_the_command_says_what_is_wrong(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner(["report", str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err
    assert tuner(["report", str(tmp_path)]) == 2 and "there is no run in this folder" in capsys.readouterr().err
    (tmp_path / "a file").write_text("")
    assert tuner(["report", str(made), "--output", str(tmp_path / "a file" / "x.html")]) == 9
    assert "--output" in capsys.readouterr().err
    for name in ("a", "b"):
        RunFolder(tmp_path / name).event("started")
        (tmp_path / name / "run.json").write_text("{}")
    assert tuner(["report", str(tmp_path)]) == 2 and "there are 2 runs below" in capsys.readouterr().err


def test_writing_is_left_to_the_caller(made: Path) -> None:
    told: list[str] = []
    write_report(made, lambda name, text: told.extend([name, text[:15]]))
    assert told == ["report.html", "<!doctype html>"]


# --- the script --------------------------------------------------------------------------------------------------
def in_node(expression: str) -> object:
    """The value of an expression that sees the script's pure functions."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the script's functions are not run")
    program = f"const m = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({expression}))"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_functions_of_the_script() -> None:
    values, weight = [3.0, 1.0, 4.0, 1.0, 5.0], 0.8
    norms = [sum(weight**k for k in range(n + 1)) for n in range(5)]
    smooth = [sum(weight ** (n - k) * values[k] for k in range(n + 1)) / norms[n] for n in range(5)]
    found = in_node(
        f"""{{smooth: m.smoothed({values}, {weight}), same: m.smoothed({values}, 0), ticks: m.ticks(0.03, 1.02, 5), one: m.ticks(2, 2, 5),
        lost: m.ticks(0.5, 0.5 + 1.2e-16, 5).length,
        small: m.ticks(1e-5, 1e-4, 4), log: m.logTicks(0.01, 3), wide: m.logTicks(1e-6, 10), narrow: m.logTicks(1.1, 1.3),
        shown: [0, 0.00012345, 1234567, 0.123456, null, 100000, -2.5].map(m.shown),
        near: [-5, 0, 4, 5, 11, 99].map((x) => m.nearest([0, 10, 12], x)),
        extent: [m.extent([[1, 2], [0, 5]], false), m.extent([[0, 1, 2]], true), m.extent([[null, NaN]], false),
          m.extent([[4, 4]], false), m.extent([[0.5, 0.5 - 6e-17]], false)],
        linear: [0, 5, 10].map(m.scale(0, 10, 100, 200, false)), log10: [1, 10, 100].map(m.scale(1, 100, 0, 2, true)),
        path: m.path([0, 1, 2, 3], [1, NaN, 2, 3], (x) => x, (y) => y, false),
        band: m.band([0, 1, 2], [1, 0, 1], [2, 2, 2], (x) => x, (y) => y, true)}}"""
    )
    assert isinstance(found, dict)
    assert found["smooth"] == pytest.approx(smooth) and found["same"] == values
    assert found["ticks"] == [0.2, 0.4, 0.6, 0.8, 1] and found["one"] == [2]
    assert found["small"] == pytest.approx([5e-5, 1e-4]) and found["narrow"] == pytest.approx([1.1, 1.15, 1.2, 1.25, 1.3])
    assert found["lost"] <= 11
    assert found["log"] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2] and found["wide"] == pytest.approx([10.0**k for k in range(-6, 2)])
    assert found["shown"] == ["0", "1.23e-4", "1.23e6", "0.1235", "", "100000", "-2.5"]
    assert found["near"] == [0, 0, 0, 0, 1, 2]
    assert found["extent"][:4] == [[0, 5], [1, 2], None, [3.6, 4.4]] and found["extent"][4] == pytest.approx([0.45, 0.55])
    assert found["linear"] == [100, 150, 200] and found["log10"] == pytest.approx([0, 1, 2])
    assert found["path"] == "M0.0 1.0M2.0 2.0L3.0 3.0" and found["band"] == "M0.0 2.0L2.0 2.0L2.0 1.0L0.0 1.0Z"


def test_the_script_draws_and_plays(page: Page, tmp_path: Path) -> None:
    """Over a stand-in for a browser's document."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the script is not run")
    (tmp_path / "data.json").write_text(json.dumps(page.data))
    stub = Path(__file__).with_name("page_stub.js")
    done = subprocess.run([node, stub, SCRIPT, tmp_path / "data.json"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["controls"] and len(told["plots"]) == 8 and all(count > 3 for count in told["plots"])
    assert told["label"] == "Loss: total 1 to 0.05, video 0.75 to 0.0375, audio 0.25 to 0.01316. Arrow keys read single steps."
    # The plot is 400 x 240 with margins of 52 left, 10 right, 8 above, 22 below; values from 0.01316 to 1, steps from 1 to 20.
    top, bottom = 8.0, 218.0
    second = bottom + (0.5 - 0.013158) / (1 - 0.013158) * (top - bottom)
    assert told["lines"][0].startswith(f"M52.0 8.0L{52 + 338 / 19:.1f} {second:.1f}L") and told["lines"][0].count("L") == 19
    assert len(told["lines"]) == 3
    assert told["pointed"] == "step 1: total 1 | video 0.75 | audio 0.25"
    assert told["right"] == "step 2: total 0.5 | video 0.375 | audio 0.25" and told["end"].startswith("step 20: total 0.05")
    assert told["left"] == "" and told["pressed"] == ["false", 2]
    assert told["smoothed"] == told["logarithmic"] == 6  # the values as they are stay visible behind
    assert told["playing"] == [[False, 0, True, True], [False, 0, False, True]] and told["aligned"] == [1.5, 1.5]
    assert told["paused"] == [[True, False, False]] * 2
