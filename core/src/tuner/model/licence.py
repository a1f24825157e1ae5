"""The licence that binds a trained model: its base model's, as that repository's own card states it. Nothing is assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml  # type: ignore[import-untyped]
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import metadata_load

UNKNOWN_LICENCE: Final = (
    "> **Licence not filled in.** The licence of the base model binds this model too, and was not known when this card was written. "
    "Put it into `license`, `license_name` and `license_link` at the top of this file, and replace this paragraph."
)
NETWORK_ERRORS: Final[tuple[type[Exception], ...]] = (OSError, *HfHubHTTPError.__bases__)
"""Whatever HTTP library the hub's client uses, the errors of a connection descend from a base of `HfHubHTTPError`."""


@dataclass(frozen=True)
class Licence:
    """As a card's front matter has it."""

    license: str
    name: str = ""
    link: str = ""

    def front_matter(self) -> dict[str, str]:
        """The keys of the front matter."""
        entries = {"license": self.license, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in entries.items() if value}

    def yaml(self) -> str:
        """The lines of the front matter."""
        return str(yaml.safe_dump(self.front_matter(), sort_keys=False, allow_unicode=True)).strip()

    def sentence(self) -> str:
        """For the card's text."""
        named = self.name or self.license
        return f"The licence of the base model binds this model too: {f'[{named}]({self.link})' if self.link else named}."

    @staticmethod
    def of(data: Mapping[str, object], repository: str) -> Licence | None:
        """From the front matter of the base model's card; None where it names none. A link into that repository is made a full one."""
        name, link = str(data.get("license_name") or ""), str(data.get("license_link") or "")
        if not (data.get("license") or name):
            return None
        if link and not link.startswith(("http://", "https://")):
            link = f"{constants.ENDPOINT}/{repository}/blob/main/{link.removeprefix('./').lstrip('/')}"
        found = data.get("license")
        return Licence(str(found[0] if isinstance(found, list) and found else found or "other"), name, link)


def base_licence(repository: str, commit: str, *, online: bool) -> Licence | None:
    """What the card of `repository` says, asked on the hub where `online`, else read from the hub's cache; None: not known."""
    if not repository:
        return None
    if online:
        try:
            data = HfApi().model_info(repository, revision=commit or None).card_data
        except NETWORK_ERRORS:
            data = None
        if data is not None:
            return Licence.of(data.to_dict(), repository)  # type: ignore[no-untyped-call]
    cached = try_to_load_from_cache(repository, "README.md", revision=commit or None)
    return Licence.of(_front_matter(Path(cached)), repository) if isinstance(cached, str) else None


def _front_matter(card: Path) -> Mapping[str, object]:
    """Of a model card; nothing where it has none that can be read."""
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
