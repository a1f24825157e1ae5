"""Trackers by name: TensorBoard files, Weights & Biases, Trackio. Each library is imported when its tracker is chosen.

A run that goes on after an interruption repeats steps; each library is told so in its own way, and shows every step once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuner.config.options import Options
from tuner.errors import EnvironmentProblem
from tuner.interfaces.services import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SOUND = ".wav"


class LibraryTracker(Tracker):
    """One that another library does."""

    library: ClassVar[str]
    """The package that is imported, which is the name of the extra that installs it, too."""

    def __init__(self, options: Options, run_folder: Path) -> None:
        self.folder = run_folder
        self._resumed = False

    @classmethod
    def check(cls) -> None:
        if importlib.util.find_spec(cls.library) is None:
            raise EnvironmentProblem(
                f"the tracker {cls.name} needs the package {cls.library}, which is not installed", where="report_to",
                remedy=f"pip install 'tuner-framework[{cls.library}]'",
            )  # fmt: skip

    def start(self, settings: Mapping[str, object]) -> None:
        self._resumed = bool(settings.get("resume_from_checkpoint"))


class TensorBoard(LibraryTracker):
    """Event files in `<run>/tensorboard`, for `tensorboard --logdir`."""

    name = "tensorboard"
    library = "tensorboard"

    def __init__(self, options: Options, run_folder: Path) -> None:
        super().__init__(options, run_folder)
        self._settings: Mapping[str, object] = {}
        self._writer: SummaryWriter | None = None

    def start(self, settings: Mapping[str, object]) -> None:
        super().start(settings)
        self._settings = settings

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _open(self, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        # What earlier files hold of this step and later ones is not shown any more.
        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in sorted(self._settings.items())]
        writer.add_text("settings", "\n".join(["| key | value |", "| --- | --- |", *rows]), step)
        return writer

    def sample(self, step: int, path: Path, label: str, prompt: str) -> None:
        if self._writer is None:
            self._writer = self._open(step)
        self._writer.add_text(f"samples/{label}", f"{prompt}\n\n`{path.name}`", step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb(LibraryTracker):
    """A run of Weights & Biases; files in `<run>/wandb`. WANDB_MODE=offline keeps everything on this machine."""

    name = "wandb"
    library = "wandb"

    def __init__(self, options: Options, run_folder: Path) -> None:
        super().__init__(options, run_folder)
        self._run: Any = None

    @classmethod
    def check(cls) -> None:
        super().check()
        if os.environ.get("WANDB_MODE", "online") != "online":
            return
        import wandb

        try:
            with unattended():
                wandb.login(force=True, verify=False)
        except wandb.errors.Error as error:
            raise EnvironmentProblem(
                f"the tracker wandb is not logged in: {error}", where="report_to",
                remedy="run `wandb login`, or set WANDB_MODE=offline",
            ) from error  # fmt: skip

    def start(self, settings: Mapping[str, object]) -> None:
        import wandb

        super().start(settings)
        # Steps are a number like others: wandb's own may not go back, and the steps since a checkpoint come again.
        self._run = wandb.init(
            project=str(settings["tracker_project_name"]), name=str(settings["tracker_run_name"]), id=self._identity(), resume="allow",
            dir=str(self.folder), config=dict(settings), force=True,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def _identity(self) -> str:
        """The id of the run that goes on, else a new one."""
        file = self.folder / "wandb" / "run-id"
        known = file.read_text(encoding="utf-8").strip() if self._resumed and file.is_file() else ""
        found = known or uuid.uuid4().hex[:8]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found, encoding="utf-8")
        return found

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def sample(self, step: int, path: Path, label: str, prompt: str) -> None:
        import wandb

        media = wandb.Audio(str(path), caption=prompt) if path.suffix == SOUND else wandb.Video(str(path), caption=prompt, format="mp4")
        self._run.log({"step": step, f"samples/{label}": media})

    def close(self) -> None:
        self._run.finish()


class Trackio(LibraryTracker):
    """A run of Trackio, in its own folder on this machine; `trackio show` opens it. Its variables decide where else it goes."""

    name = "trackio"
    library = "trackio"

    def __init__(self, options: Options, run_folder: Path) -> None:
        super().__init__(options, run_folder)
        self._run: Any = None

    def start(self, settings: Mapping[str, object]) -> None:
        import trackio

        super().start(settings)
        self._run = trackio.init(
            project=str(settings["tracker_project_name"]), name=str(settings["tracker_run_name"]), config=dict(settings),
            resume="allow" if self._resumed else "never", embed=False,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def sample(self, step: int, path: Path, label: str, prompt: str) -> None:
        import trackio

        media = trackio.Audio(str(path), caption=prompt) if path.suffix == SOUND else trackio.Video(str(path), caption=prompt)
        self._run.log({f"samples/{label}": media}, step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def unattended() -> Iterator[None]:
    """Lets a library see no terminal to ask questions on: it fails instead, with a reason."""
    former = sys.stdin
    try:
        with Path(os.devnull).open(encoding="utf-8") as sys.stdin:
            yield
    finally:
        sys.stdin = former
