"""The tutorial "write a regularizer", done by the letter: its files are written, its package is built and installed into an environment of
its own, its commands are run, and what it shows is compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.test_docs import Snippet, commands, compare, snippets
from tuner.cli.main import run
from tuner.train.saving.checkpoint import load_checkpoint

PAGE = "docs/tutorial/write-a-regularizer.md"
PACKAGE = "tuner_dispersive"
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
"""Behind `pip install`: hatchling and all that the package depends on are here already."""


class Environment:
    """A virtual environment that also sees what is installed here."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}, scheme="posix_prefix"))
        here = sysconfig.get_path("purelib")
        (self.site / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and what was printed. `tuner` and `pip` are called as modules: their scripts belong to another environment."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(self.python), "-m", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env=environment
        )
        return done.returncode, done.stdout

    def forget(self) -> None:
        """What this process imported of the package, so that it is found anew, or not at all."""
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


class Reader:
    """Does what the page says."""

    def __init__(self, environment: Environment, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.environment, self.capsys, self.patch = environment, capsys, patch
        self.printed = ""
        self.said: dict[str, str] = {}
        """Command -> what it printed."""

    def follow(self, snippet: Snippet) -> None:
        where = f"{PAGE}:{snippet.line}"
        if snippet.file:
            Path(snippet.file).parent.mkdir(parents=True, exist_ok=True)
            Path(snippet.file).write_text(snippet.text, encoding="utf-8")
        elif snippet.language == "python":
            exec(compile(snippet.text, where, "exec"), {"__name__": "__main__"})
        elif snippet.language == "sh":
            self.printed = "".join(self.shell(command, where) for command in commands(snippet))
        elif snippet.language == "text":
            compare(snippet.text, self.printed, where)
        else:
            pytest.fail(f"{where}: nobody knows what to do with this block")

    def shell(self, command: str, where: str) -> str:
        command, _, comment = command.partition("    #")
        wanted = re.search(r"exit code (\d+)", comment)
        code, printed = self.execute(command.split())
        assert code == (int(wanted[1]) if wanted else 0), f"{where}: `{command}` ended with {code}:\n{printed}"
        self.said[command.strip()] = printed
        return printed

    def execute(self, words: list[str]) -> tuple[int, str]:
        match words:
            case ["export", setting]:
                self.patch.setenv(*setting.split("=", 1))
                return 0, ""
            case ["pip", *_]:
                self.environment.forget()
                return self.environment.run(*words, *(OFFLINE if words[1] == "install" else ()))
            case ["python", "-m", *rest]:
                return self.environment.run(*rest)
            case ["tuner", "plugins", *_]:
                return self.environment.run("tuner.cli.main", *words[1:])
            case ["tuner", *rest]:  # in this process, which has loaded torch already; a command's module knows the plugins of its import
                self.patch.delitem(sys.modules, f"tuner.cli.{rest[0]}", raising=False)
                code = run(rest)
                return code, "".join(self.capsys.readouterr())
        raise AssertionError(f"an unknown command: {words}")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environment]:
    made = Environment(tmp_path / "environment")
    monkeypatch.syspath_prepend(made.site)
    yield made
    made.forget()


def test_the_tutorial_by_the_letter(
    environment: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reader = Reader(environment, capsys, monkeypatch)
    for snippet in snippets(PAGE):
        reader.follow(snippet)
    said = reader.said
    assert re.search(r"Successfully installed tuner-dispersive-0\.1\.0", said["pip install ./tuner-dispersive"])
    assert int(re.findall(r"(\d+) passed", said["python -m pytest -q tuner-dispersive"])[0]) >= 14
    page = Path(__file__).parents[2].joinpath(PAGE).read_text(encoding="utf-8")
    shown = re.findall(r"`(dispersive_block: .*?)`\)", page)[0]
    assert shown in said["tuner train --config config.json --dispersive_block 9"]
    rows = [json.loads(line) for line in Path("output/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all("loss/dispersive" in row for row in rows[1:]) and "loss/dispersive" not in rows[0]  # alone, it has nobody to keep away from
    assert len(load_checkpoint(Path("output/checkpoint-9")).parts["regularizer-dispersive"]["memory"]) == 9
    refused = said["tuner train --config without.json --resume_from_checkpoint latest"]
    assert "cannot be continued exactly" in refused and "dispersive" in refused
    clean = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "F,E4,E7,E9,B", "tuner-dispersive"]
    done = subprocess.run(clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
