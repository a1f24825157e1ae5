"""Trackers beside metrics.jsonl: told in threads of their own, so that none can fail, slow down or stop a training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.component import Component
from tuner.config.resolve import Settings
from tuner.config.settings import RunSettings
from tuner.interfaces.services import Tracker
from tuner.plugins.record import reason_of

if TYPE_CHECKING:
    from tuner.plugins.registry import Registry

WAITING = 1000
"""Rows that a slow tracker may lag behind before rows are left out."""
CLOSE_SECONDS = 30.0
"""What all trackers together get at the end to send what they hold."""

Message = Callable[[Tracker], None]
"""What a tracker is told: a call of one of its methods."""


def chosen_trackers(registry: Registry, settings: Settings) -> list[Component]:
    """The trackers that `report_to` names, each once, imported.

    Raises `ConfigError` for an unknown one, `PluginError` for one that cannot be imported, `EnvironmentProblem` for one that cannot work.
    """
    words = [word.strip() for word in settings.get(RunSettings).report_to.split(",")]
    names = dict.fromkeys(word for word in words if word)
    if list(names) == ["none"]:
        return []
    components = [registry.component("tracker", name) for name in names]
    for component in components:
        factory = component.load()
        if isinstance(factory, type) and issubclass(factory, Tracker):
            factory.check()
    return components


class TrackerThread:
    """One tracker in a daemon thread. What it is to be told waits in a bounded queue; what it cannot do is said once, through `news`."""

    def __init__(self, name: str, make: Callable[[], Tracker], settings: Mapping[str, object], waiting: int = WAITING) -> None:
        self.name = name
        self._messages: queue.Queue[Message | None] = queue.Queue(waiting)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, args=(make, settings), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Hands over a row; never waits. A row for which there is no room is left out."""
        kept = dict(row)
        self._hand_over(step, lambda tracker: tracker.log(step, kept))

    def sample(self, step: int, path: Path, label: str, prompt: str) -> None:
        """The same for a sample."""
        self._hand_over(step, lambda tracker: tracker.sample(step, path, label, prompt))

    def _hand_over(self, step: int, message: Message) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._news.put(f"tracker {self.name} does not keep up; rows are left out from step {step} on (metrics.jsonl has all)")

    def news(self) -> list[str]:
        """What happened since the last call, in words."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def finish(self) -> None:
        """Asks it to close after the rows that wait; `join` waits for that."""
        while self._thread.is_alive():
            try:
                self._messages.put_nowait(None)
                return
            except queue.Full:
                self._make_room()

    def _make_room(self) -> None:
        try:
            self._messages.get_nowait()
            self._dropped += 1
        except queue.Empty:
            return

    def join(self, seconds: float) -> None:
        """Waits at most so long; a tracker that is not done by then ends with the process."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._news.put(f"tracker {self.name} did not finish in time and is left behind (metrics.jsonl has all)")

    def _run(self, make: Callable[[], Tracker], settings: Mapping[str, object]) -> None:
        try:
            tracker = make()
            tracker.start(settings)
            while (message := self._messages.get()) is not None:
                message(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:  # whatever a plugin raises; some libraries exit
            self._news.put(f"tracker {self.name} failed and is left out (metrics.jsonl has all): {reason_of(error)}")


class Trackers:
    """All trackers of a run. `note` is told, once each, of those that fail, hang or lag."""

    def __init__(self, threads: Sequence[TrackerThread], note: Callable[[str], None]) -> None:
        self._threads = tuple(threads)
        self._note = note

    @classmethod
    def of(cls, registry: Registry, settings: Settings, folder: Path, note: Callable[[str], None]) -> Trackers:
        """Starts those that `report_to` names. They get the resolved settings without secrets."""
        values = tracker_settings(settings, folder)
        return cls([TrackerThread(c.name, _maker(c, settings, folder), values) for c in chosen_trackers(registry, settings)], note)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Forwards a row of numbers to every tracker."""
        for thread in self._threads:
            thread.log(step, row)
        self._tell()

    def sample(self, step: int, path: Path, label: str, prompt: str) -> None:
        """Tells every tracker of a sample."""
        for thread in self._threads:
            thread.sample(step, path, label, prompt)
        self._tell()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Lets them finish, in `seconds` all together."""
        for thread in self._threads:
            thread.finish()
        for thread in self._threads:
            thread.join(seconds / len(self._threads))
        self._tell()

    def _tell(self) -> None:
        for thread in self._threads:
            for text in thread.news():
                self._note(text)


def tracker_settings(settings: Settings, folder: Path) -> dict[str, object]:
    """Key -> value, secrets masked; `tracker_run_name` is the run folder's name when empty."""
    values = {key: entry["value"] for key, entry in settings.resolved().items()}
    values["tracker_run_name"] = values["tracker_run_name"] or folder.resolve().name
    return values


def _maker(component: Component, settings: Settings, folder: Path) -> Callable[[], Tracker]:
    factory = component.load()
    options = settings.get(component.options)
    return lambda: factory(options, folder)  # type: ignore[operator, no-any-return]
