"""The model hub as far as an upload goes, in place of `HfApi`: repositories with owners, visibility and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tuner.model import licence
from tuner.train.publish import upload


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """The client's own error for an answer of the hub."""
    answer = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} for https://hub/api?signature=secret", response=answer)  # type: ignore[arg-type]


@dataclass
class HubStub:
    """Called in place of the class, and as its instance."""

    who: dict[str, Any] = field(default_factory=lambda: {"name": "ann", "orgs": [{"name": "club", "roleInOrg": "write"}]})
    private: dict[str, bool] = field(default_factory=dict)
    """Repository -> whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cards: dict[str, dict[str, str]] = field(default_factory=dict)
    """Front matter of base models."""
    failing: dict[str, Exception] = field(default_factory=dict)
    """Method -> what it raises."""
    calls: list[str] = field(default_factory=list)

    def __call__(self, **_: str) -> HubStub:
        return self

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method in self.failing:
            raise self.failing[method]

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return self.who

    def model_info(self, name: str, revision: str | None = None) -> SimpleNamespace:
        self._called("model_info")
        if name in self.cards:
            return SimpleNamespace(private=False, card_data=ModelCardData(**self.cards[name]))
        if name not in self.private:
            raise refusal(404, RepositoryNotFoundError)
        return SimpleNamespace(private=self.private[name], card_data=None)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        self._called("create_repo")
        full = name if "/" in name else f"{self.who['name']}/{name}"
        assert exist_ok
        self.private.setdefault(full, private)
        return SimpleNamespace(repo_id=full)

    def update_repo_settings(self, name: str, *, private: bool) -> None:
        self._called("update_repo_settings")
        self.private[name] = private

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self._called("upload_folder")
        found = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*") if path.is_file()}
        self.files.setdefault(repo_id, {}).update(found)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def install(self, patch: pytest.MonkeyPatch, token: str | None = "hf_secret") -> HubStub:
        """Takes the place of the client, with a token in its usual place."""
        for module in (upload, licence):
            patch.setattr(module, "HfApi", self)
        patch.setattr(upload, "get_token", lambda: token)
        return self
