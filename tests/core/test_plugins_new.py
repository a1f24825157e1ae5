"""`tuner plugins new`: what it writes is clean, is listed and passes its own tests; what it cannot write it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.cli.main import run
from tuner.cli.plugins_new import LONGEST, STARTERS, fill
from tuner.plugins.loader import load_plugins

ROOT = Path(__file__).parents[2]
KINDS = list(STARTERS)
TITLE = "aa-{}-with-a-rather-long-name"
"""`aa` sorts before other names, and the length shows lines that only fit short ones."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one plugin of each kind."""
    folder = tmp_path_factory.mktemp("plugins")
    for kind in KINDS:
        assert run(["plugins", "new", kind, TITLE.format(kind), "--into", str(folder)]) == 0
    return folder


@pytest.fixture
def installed(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All of them installed as an editable install does it: their source folders and their metadata are on the path."""
    for project in sorted(written.iterdir()):
        facts = tomllib.loads((project / "pyproject.toml").read_text())["project"]
        info = tmp_path / f"{facts['name'].replace('-', '_')}-{facts['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {facts['name']}\nVersion: {facts['version']}\n")
        points = "".join(f"{name} = {module}\n" for name, module in facts["entry-points"]["tuner"].items())
        (info / "entry_points.txt").write_text(f"[tuner]\n{points}")
        monkeypatch.syspath_prepend(project / "src")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("tuner_aa_"):
            del sys.modules[name]


def test_it_is_listed_and_can_be_imported(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {record.name: record for record in load_plugins().plugins}
    for kind, starter in STARTERS.items():
        name = TITLE.format(kind).replace("-", "_")
        assert (records[name].status, records[name].notes, records[name].version) == ("loaded", (), "0.1.0")
        assert name in [component.name for component in records[name].components[starter.kind]]
    assert run(["plugins", "check"]) == 0
    assert run(["plugins", "show", "aa_loss_with_a_rather_long_name"]) == 0
    assert "the pseudo-Huber distance" in capsys.readouterr().out


def test_a_name_that_is_taken_is_refused(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "new", "loss", TITLE.format("loss"), "--into", str(tmp_path / "again")]) == 2
    assert "is taken: a plugin is called aa_loss_with_a_rather_long_name" in capsys.readouterr().err


def test_what_is_written_is_clean(written: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", str(written)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for path in (path for path in written.rglob("*") if path.is_file()):
        assert not re.search(r"\{\{|NAME\b", path.read_text()), path
    readme = (written / f"tuner-{TITLE.format('memory')}" / "README.md").read_text()
    assert "| `aa_memory_with_a_rather_long_name` | false | switches it on |" in readme


def test_what_is_written_passes_its_own_tests(written: Path) -> None:
    """All kinds in one process of their own, with nothing but their source folders on the path."""
    sources = os.pathsep.join(str(path / "src") for path in written.iterdir())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(written)]
    done = subprocess.run(
        [*command, *(str(path / "tests") for path in sorted(written.iterdir()))], cwd=written, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 70


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["regularizer", "Warm Tones"], r"NAME: must be words of small letters .*'Warm Tones'.*such as warm-tones"),
        (["regularizer", "9lives"], "NAME: must be words of small letters .*such as lives"),
        (["regularizer", "--", "-x"], "NAME: must be words"),
        (["regularizer", "a__b"], "NAME: must be words"),
        (["regularizer", "x" * (LONGEST + 1)], "NAME: is longer than"),
        (["regularizer", "tuner-x"], r"NAME: is called tuner-\.\.\. in any case .*use x"),
        (["family", "ltxvideo2"], "NAME: is taken: a plugin is called ltxvideo2"),
        (["memory", "block-swap"], "NAME: is taken: offload offers a memory strategy block_swap"),
        (["memory", "strict"], "NAME: is taken: strict is a key of core"),
        (["loss", "audio-loss"], "NAME: is taken: audio_loss_weight is a key of ltxvideo2"),
        (["encoder", "class"], "NAME: is a word of Python itself .*'class'"),
        (["encoder", "config"], "NAME: cannot be: its key config is reserved for the command line"),
        (["encoder", "help"], "its key help is reserved"),
        (["memory", "json"], "its key json is reserved"),
        (["encoder", "debug"], "its key debug is reserved"),
        (["memory", "enabled"], r"its key enabled would hide Options\.enabled"),
        (["memory", "copy"], r"its key copy would hide Options\.copy"),
        (["encoder", "title"], r"its key title would hide Options\.title"),
        (["encoder", "option"], "NAME: would hide option, which the files of the plugin use"),
        (["encoder", "record"], "NAME: would hide Record"),
        (["loss", "framework"], "NAME: is taken: a distribution tuner-framework is installed"),
        (["loss", "testing"], "NAME: is taken: a part of tuner itself is called testing"),
        (["thing", "x"], "'thing' is not one of 'regularizer'"),
        (["loss"], "Missing argument 'NAME'"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_refused(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "new", "--into", str(tmp_path / "here"), *arguments]) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split())), said
    assert not (tmp_path / "here").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tuner-mine").mkdir()
    (tmp_path / "tuner-mine" / "notes.txt").write_text("keep")
    assert run(["plugins", "new", "loss", "mine", "--into", str(tmp_path)]) == 2
    assert "--into: exists already, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "tuner-mine").iterdir()] == ["notes.txt"]
    assert run(["plugins", "new", "loss", "mine", "--into", str(tmp_path / "tuner-mine" / "notes.txt" / "deep")]) == 2
    assert "is a file, no folder" in capsys.readouterr().err


def test_a_placeholder_that_nobody_fills_is_an_error() -> None:
    assert fill("{{one}} and {{one}}", {"one": "1"}) == "1 and 1"
    with pytest.raises(KeyError):
        fill("{{other}}", {"one": "1"})


def test_the_wheel_brings_all_templates(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT / "core", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("tuner/templates/") for name in archive.namelist() if name.startswith("tuner/templates/")}
    templates = ROOT / "core" / "src" / "tuner" / "templates"
    assert held == {str(path.relative_to(templates)) for path in templates.rglob("*") if path.is_file()}
    assert len(held) > 25
