"""Sends the outbox of a run to the model hub: asked about before the run begins, carried out when it has ended, or later.

Special here: a run that can never be uploaded (no token, one that cannot write, a repository that is public already) fails before any
work is done; a run that has finished never fails for the hub's sake. Importing this costs no torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import tuner
from tuner.config.masking import masked
from tuner.config.resolve import Settings
from tuner.config.settings import RunSettings
from tuner.errors import ConfigError, HubError
from tuner.model.licence import NETWORK_ERRORS, UNKNOWN_LICENCE, base_licence
from tuner.train.publish import outbox as boxes
from tuner.train.publish.outbox import Outbox
from tuner.train.run import now

T = TypeVar("T")
LOGIN: Final = "run `hf auth login` with a token that may write, or set HF_TOKEN"
REFUSED: Final = (401, 403)
"""HTTP status of a token that is not accepted, or may not do this."""
_UPLOAD_ERRORS: Final[tuple[type[Exception], ...]] = (*NETWORK_ERRORS, ValueError, RuntimeError)
"""Beside the network's: what the client raises for answers it does not expect, and its transfer library for everything."""


@dataclass(frozen=True)
class Destination:
    """Where the result of a run goes."""

    wanted: bool
    """push_to_hub."""
    name: str
    """Of the repository, without owner."""
    repository: str = ""
    """`owner/name`; empty where the owner is not known yet."""
    private: bool = True
    online: bool = False
    """Whether the hub has answered."""


def planned_destination(settings: Settings) -> Destination:
    """What the keys say, without asking anybody. Raises `ConfigError` for a name that no repository can have."""
    run = settings.get(RunSettings)
    if not run.hub_model_id:
        chosen = run.tracker_run_name or Path(run.output_dir).expanduser().resolve().name
        name = boxes.repository_name(str(masked(chosen)))
        return Destination(run.push_to_hub, name, private=run.hub_private)
    _require_valid(run.hub_model_id, "hub_model_id")
    owner, _, name = run.hub_model_id.rpartition("/")
    return Destination(run.push_to_hub, name, run.hub_model_id if owner else "", run.hub_private)


def check_destination(settings: Settings, note: Callable[[str], None]) -> Destination:
    """Before a run: where its result goes, and with `push_to_hub` whether it will be let in there.

    Without a network the upload is tried at the end all the same, which `note` is told. Raises `ConfigError`, and `HubError` where
    there is no token, or one that cannot write there, or where a private repository is asked for and a public one exists.
    """
    planned = planned_destination(settings)
    if not planned.wanted:
        return planned
    _require_token("push_to_hub")
    api = _api()
    try:
        who = api.whoami()
        repository = planned.repository or f"{who['name']}/{planned.name}"
        _require_write(who, repository)
        if planned.private and _is_public(api, repository):
            raise _public_already(repository, "set hub_private to false, or hub_model_id to another name")
    except NETWORK_ERRORS as error:
        if _status(error) in REFUSED:
            raise HubError("the hub does not accept the token", where="push_to_hub", remedy=LOGIN) from error
        note(f"the hub cannot be asked now ({_reason(error)}); the upload is tried when training has ended")
        return planned
    return replace(planned, repository=repository, online=True)


def send(outbox: Outbox, repository: str = "", *, private: bool | None = None) -> Outbox:
    """Uploads the outbox; makes the repository where there is none. Sending it again changes nothing there.

    `repository`: another than the outbox's own. `private`: None is what the run was configured with; False opens a private one.
    Raises `HubError`, `ConfigError` for an impossible name.
    """
    if repository:
        _require_valid(repository, "--repo")
    _require_token()
    api = _api()
    hidden = outbox.private if private is None else private
    wanted = repository or outbox.repository or outbox.name
    found = _told(wanted, lambda: api.create_repo(wanted, private=hidden, exist_ok=True).repo_id)
    public = _told(found, lambda: _is_public(api, found))
    if hidden and public:
        raise _public_already(found, "add --public to `tuner push`, or --repo with another name")
    outbox = _with_complete_card(outbox, found)
    commit = _told(found, lambda: api.upload_folder(repo_id=found, folder_path=outbox.folder, commit_message="Upload from tuner"))
    if not hidden and not public:  # opened only when everything is there
        _told(found, lambda: api.update_repo_settings(found, private=False))
    sent = replace(outbox, repository=found, private=hidden, sent={"repository": found, "url": str(commit.commit_url), "time": now()})
    sent.save()
    return sent


def later(run: Path) -> str:
    """The command that sends it."""
    return f"tuner push {shlex.quote(str(run))}"


def page(repository: str) -> str:
    """Its address."""
    return f"{constants.ENDPOINT}/{repository}"


def _api() -> HfApi:
    return HfApi(library_name="tuner", library_version=tuner.__version__)


def _with_complete_card(outbox: Outbox, repository: str) -> Outbox:
    """Puts into the card what was not known when it was written: whose repository it is, and the base model's licence."""
    text = changed = outbox.card_text()
    if outbox.named != repository:
        changed = changed.replace(outbox.named, repository)
    if UNKNOWN_LICENCE in changed and (licence := base_licence(outbox.base, outbox.commit, online=True)):
        entries = licence.yaml()
        changed = re.sub(r"^license: other$", lambda _: entries, changed, count=1, flags=re.MULTILINE)
        changed = changed.replace(UNKNOWN_LICENCE, licence.sentence())
    return outbox.with_card(changed, repository) if changed != text else outbox


# --- asking ------------------------------------------------------------------------------------------------------
def _require_valid(repository: str, where: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            "no repository can be called that", where=where, value=repository,
            remedy="write `owner/name`: letters, digits, `-`, `_` and `.`, at most 96 characters",
        ) from error  # fmt: skip


def _require_token(where: str = "") -> None:
    if get_token() is None:
        raise HubError("there is no token to upload with", where=where, remedy=LOGIN)


def _require_write(who: Mapping[str, object], repository: str) -> None:
    """Raises `HubError` where the answer of `whoami` says that the token cannot write to `repository`; what it does not say is let pass."""
    owner = repository.partition("/")[0]
    if owner.casefold() != str(who.get("name", "")).casefold():
        _require_member(who, owner)
    auth = who.get("auth")
    token = auth.get("accessToken") if isinstance(auth, Mapping) else None
    role = token.get("role") if isinstance(token, Mapping) else None
    if role == "read" or (role == "fineGrained" and not _covers(token, owner, repository)):
        raise HubError("the token may read, not write there", where="push_to_hub", value=repository, remedy=LOGIN)


def _require_member(who: Mapping[str, object], owner: str) -> None:
    orgs = who.get("orgs")
    roles = {str(org.get("name", "")).casefold(): org.get("roleInOrg") for org in orgs} if isinstance(orgs, list) else {}
    if roles.get(owner.casefold(), "read") == "read":
        said = "may only read there" if owner.casefold() in roles else "is no member of it"
        remedy = "name a repository of your own, or log in anew"
        raise HubError(f"the token's user {said}", where="hub_model_id", value=owner, remedy=remedy)


def _covers(token: object, owner: str, repository: str) -> bool:
    """Whether a fine-grained token may write to all of `owner`, or to `repository`."""
    fine = token.get("fineGrained") if isinstance(token, Mapping) else None
    scopes = fine.get("scoped") if isinstance(fine, Mapping) else None
    if not isinstance(scopes, list):
        return True
    names = {owner.casefold(), repository.casefold()}
    writable = [scope.get("entity", {}) for scope in scopes if "repo.write" in scope.get("permissions", ())]
    return any(str(entity.get("name", "")).casefold() in names for entity in writable)


def _is_public(api: HfApi, repository: str) -> bool:
    """Whether it exists and everybody can see it."""
    try:
        return not api.model_info(repository).private
    except RepositoryNotFoundError:
        return False


def _public_already(repository: str, remedy: str) -> HubError:
    return HubError("a private repository is asked for, and this one is public", where="hub_private", value=repository, remedy=remedy)


# --- telling -----------------------------------------------------------------------------------------------------
def _told(repository: str, call: Callable[[], T]) -> T:
    """Runs a call to the hub and tells its failures in words."""
    try:
        return call()
    except _UPLOAD_ERRORS as error:
        refused = _status(error) in REFUSED
        remedy = LOGIN if refused else "try again later"
        raise HubError(f"the upload failed: {_reason(error)}", where=repository, remedy=remedy) from error


def _status(error: BaseException) -> int:
    """Of the hub's answer; 0: it did not answer."""
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) and error.response is not None else 0


def _reason(error: BaseException) -> str:
    """One line without addresses, which may be signed."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status, said = _status(error), getattr(error, "server_message", None)
    if status:
        return f"{type(error).__name__}, HTTP {status}" + (f": {said}" if said else "")
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {re.sub(r'[a-z]+://[^ ]+', '...', line)[:200]}".rstrip(": ")
