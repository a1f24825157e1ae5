"""Every snippet that a page offers to copy is run, in the page's order, in one working folder per page.

A `tuner` line runs in this process, everything else in bash. `# exit code N` behind a command says how it ends; 130 presses Ctrl-C
during training. A `text` block below a shell snippet is what that snippet prints: the beginnings of its lines are compared, with
all numbers taken as equal. "Save this as `NAME`" writes the snippet below it to that file.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from integration.project import add_clip
from tuner.cli.main import run
from tuner.cli.train import Terminal
from tuner.config.datasets import load_datasets
from tuner.config.resolve import resolve
from tuner.config.settings import DataSettings
from tuner.plugins.loader import load_plugins

ROOT = Path(__file__).parents[2]
TUTORIAL = "docs/tutorial/first-lora.md"
PATTERNS = (
    "README.md", "CONTRIBUTING.md", "docs/README.md", "docs/tutorial/*.md", "docs/guides/*.md", "core/README.md", "plugins/*/README.md",
)  # fmt: skip
OWN_TEST = {"docs/tutorial/write-a-regularizer.md": "test_write_a_regularizer.py"}
"""Pages that need an environment of their own, and the test that does what they say."""
PAGES = sorted({str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern)} - OWN_TEST.keys())
LINKED = (*PATTERNS, "docs/**/*.md", "examples/*.md", "examples/*/*.md", "benchmarks/*.md", "core/CHANGELOG.md", "plugins/*/CHANGELOG.md")

NOT_RUN = {
    r"(\S+/)?pip install ": "installs packages; the suite runs on an installation",
    r"tuner server ": "goes on until it is ended; tests/core/test_server.py starts it",
    r"ssh ": "needs another machine",
    r"make( |$)": "sets up an environment of its own, or starts this suite; .ci/run calls the targets",
}
"""Shell lines, by a pattern of their beginning, and why they are left out."""
ONLY_COMPILED = {"LTX2Pipeline.from_pretrained(": "needs the hub; test_lora_in_diffusers.py loads such a file into that class"}
"""Python snippets, by a text that occurs in them, and why they are not run."""
SMALL = ("--model_flavour", "tiny", "--mixed_precision", "no", "--resolution", "64", "--max_train_steps", "1")
"""Behind every command that reads the configuration, on pages that speak of the real model."""
SMALL_SAMPLES = {
    "TUNER_VALIDATION_RESOLUTION": "64x64", "TUNER_VALIDATION_NUM_VIDEO_FRAMES": "9", "TUNER_VALIDATION_NUM_INFERENCE_STEPS": "1",
    "TUNER_VALIDATION_GUIDANCE": "1",
}  # fmt: skip
"""Variables for these pages."""
INTERRUPTED_AFTER = 12
"""Steps before Ctrl-C."""


@dataclass(frozen=True)
class Snippet:
    """A fenced block."""

    language: str
    text: str
    line: int
    file: str
    """Where the paragraph above says to save it; empty: nowhere."""


def snippets(page: str) -> Iterator[Snippet]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        above = text[: match.start()].rstrip().rpartition("\n\n")[2]
        named = re.search(r"[Ss]ave (?:it|this) as\s+`([^`]+)`", above)
        yield Snippet(match[1], match[2], text.count("\n", 0, match.start()) + 1, named[1] if named else "")


def commands(snippet: Snippet) -> list[str]:
    """The lines of a shell snippet, continued ones joined, comments dropped."""
    lines = re.sub(r"\\\n\s*", " ", snippet.text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def reason_not_to_run(command: str) -> str:
    """Empty: it is run."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), "")


class Reader:
    """Does what a page says."""

    def __init__(self, page: str, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.page, self.capsys, self.patch = page, capsys, patch
        self.printed = ""
        self.previous = ""
        """What the last snippet printed, and its language."""

    def follow(self, snippet: Snippet) -> None:
        """Runs, saves or compares one snippet."""
        where = f"{self.page}:{snippet.line}"
        if snippet.file:
            Path(snippet.file).parent.mkdir(parents=True, exist_ok=True)
            Path(snippet.file).write_text(snippet.text, encoding="utf-8")
        match snippet.language:
            case "sh" | "bash":
                self.printed = "".join(self.shell(command, where) for command in commands(snippet))
            case "python":
                self.python(snippet, where)
            case "json":
                check_json(snippet, where)
            case "text":
                if self.previous in ("sh", "bash") and self.printed:
                    compare(snippet.text, self.printed, where)
            case other:
                pytest.fail(f"{where}: a block in {other or 'no language'}; say sh, python, json or text")
        self.previous = snippet.language

    def shell(self, command: str, where: str) -> str:
        """What it prints; it must end as the comment behind it says."""
        if reason_not_to_run(command):
            return ""
        wanted = re.search(r"#.*\bexit code (\d+)", command)
        expected = int(wanted[1]) if wanted else 0
        words = shlex.split(command, comments=True)
        if words[0] == "tuner":
            code = self.tuner(words[1:], expected)
            printed = "".join(self.capsys.readouterr())
        elif words[0] == "python" and words[1].endswith(".py"):
            runpy.run_path(words[1], run_name="__main__")
            code, printed = 0, "".join(self.capsys.readouterr())
        else:
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
            code, printed = done.returncode, done.stdout + done.stderr
        assert code == expected, f"{where}: `{command}` ended with {code}:\n{printed}"
        return printed

    def tuner(self, arguments: list[str], expected: int) -> int:
        """Runs a command line here, where torch is loaded already."""
        if self.page != TUTORIAL and arguments[0] in ("train", "plan", "cache", "sample", "export"):
            arguments = [*arguments, *SMALL]
        with self.patch.context() as patch:
            if expected == 128 + signal.SIGINT:
                patch.setattr(Terminal, "training", interrupting(Terminal.training))
            return run(arguments)

    def python(self, snippet: Snippet, where: str) -> None:
        """Compiles it, and runs it unless a command of the page does or it cannot run here."""
        code = compile(snippet.text, where, "exec")
        if not snippet.file and not any(text in snippet.text for text in ONLY_COMPILED):
            exec(code, {"__name__": "__main__"})


Shown = Callable[[Terminal, int, int, Mapping[str, float]], None]


def interrupting(method: Shown) -> Shown:
    """`Terminal.training` which also presses Ctrl-C, as a real signal."""

    def training(self: Terminal, step: int, total: int, metrics: Mapping[str, float]) -> None:
        method(self, step, total, metrics)
        if step == INTERRUPTED_AFTER:
            signal.raise_signal(signal.SIGINT)

    return training


def check_json(snippet: Snippet, where: str) -> None:
    """A list is a dataset file, an object a configuration; both must be accepted as they stand."""
    file = Path(snippet.file or "snippet.json")
    file.write_text(snippet.text, encoding="utf-8")
    if isinstance(json.loads(snippet.text), list):
        assert load_datasets(file, None, DataSettings(), {"model_family": "ltxvideo2", "output_dir": "output"}), where
        return
    registry = load_plugins()
    settings = resolve(registry.option_types, config_file=file, flags={}, environ={}, hint=registry.hint())
    assert not settings.notices, f"{where}: {settings.notices}"


def label(line: str) -> str:
    """The beginning of a printed line: the first column of a table, else the first four words; every number as `#`."""
    plain = re.sub(r"\d+(\.\d+)?", "#", line.strip())
    return " ".join(re.split(r"\s{2,}", plain)[0].split()[:4])


def compare(shown: str, printed: str, where: str) -> None:
    """Every line shown must begin like a line printed."""
    labels = {label(line) for line in printed.splitlines()}
    missing = [line for line in shown.splitlines() if line.strip() and label(line) not in labels]
    assert not missing, f"{where}: shown but not printed: {missing}\nprinted:\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_runs(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read when the client is imported; nothing may be uploaded
    monkeypatch.setattr(sys, "argv", ["page"])
    # Readers have activated the environment: a shell line that begins with a variable calls its commands.
    monkeypatch.setenv("PATH", sysconfig.get_path("scripts"), prepend=os.pathsep)
    found = list(snippets(page))
    if page != TUTORIAL and found:
        for name in ("cat", "dog"):
            add_clip(tmp_path / "my_clips", name, frames=9)
        for key, value in SMALL_SAMPLES.items():
            monkeypatch.setenv(key, value)
    reader = Reader(page, capsys, monkeypatch)
    for snippet in found:
        reader.follow(snippet)


def test_the_tutorials_configuration_for_the_real_model_can_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    add_clip(tmp_path / "my_clips", "amber", frames=49)
    blocks = [snippet for snippet in snippets(TUTORIAL) if snippet.language == "json"]
    (real,) = [block for block in blocks if not block.file and "model_family" in block.text]
    (dataset,) = [block for block in blocks if block.file.endswith("dataset.json")]
    Path("config").mkdir()
    Path("config/config.json").write_text(real.text, encoding="utf-8")
    Path(dataset.file).write_text(dataset.text, encoding="utf-8")
    assert run(["train", "--dry-run", "--model_flavour", "tiny"]) == 0
    assert "@49 (1)" in capsys.readouterr().out


def test_what_is_left_out_still_occurs() -> None:
    found = [snippet for page in PAGES for snippet in snippets(page)]
    shell = [command for snippet in found if snippet.language in ("sh", "bash") for command in commands(snippet)]
    python = "".join(snippet.text for snippet in found if snippet.language == "python")
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in shell)] == []
    assert [text for text in ONLY_COMPILED if text not in python] == []


def anchors(page: Path) -> set[str]:
    """What `#...` can point to: headings in lower case, punctuation gone, spaces as dashes."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in sorted({path for pattern in LINKED for path in ROOT.glob(pattern)}):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_pictures_are_few_small_and_shown() -> None:
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert len(pictures) <= 3 and [path.name for path in pictures if path.suffix != ".png" or f"images/{path.name})" not in pages] == []
    assert [path.name for path in pictures if path.stat().st_size > 150_000] == []
