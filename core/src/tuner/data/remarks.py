"""Remarks: what of a clip deserves a second look before it is trained. None of them keeps a clip out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tuner.config.entries import CaptionedEntry, DatasetEntry
from tuner.data.facts import MediaFacts
from tuner.data.items import Item, Verdict
from tuner.data.looks import Heard, Look, Seen
from tuner.data.similarity import Hash, first_similar

Kind = Literal[
    "held out and trained", "duplicate", "near duplicate", "silent", "clipped", "long caption", "dark", "static", "enlarged",
    "repeated frames",
]  # fmt: skip
DARK = 0.06
"""Mean brightness, 0 to 1: below it there is hardly anything to see."""
STATIC = 2 / 255
"""Change of brightness, 0 to 1, that compression alone makes in a picture that stands still."""
CLIPPED = 1e-4
"""Share of samples: about five in each second and channel. Compression smooths most of a plateau away."""
ENLARGED = 1.5
"""Times, in width or height, whichever is more."""
REPEATED = 0.75
"""Frames per second of the file over those of training: below it one frame in four or more is a repetition."""
TOKENS_PER_WORD, BYTES_PER_TOKEN = 4 / 3, 4
"""Of subword vocabularies of a hundred thousand and more, for English; for scripts without spaces the bytes count."""
SHOWN = 60
"""Letters of a caption in a message."""


@dataclass(frozen=True)
class Remark:
    """What was noticed about one file."""

    kind: Kind
    """What it is counted under."""
    text: str
    """With this file's numbers."""


def estimate_tokens(caption: str) -> int:
    """About how many tokens a caption has: no tokenizer is loaded."""
    return math.ceil(max(len(caption.split()) * TOKENS_PER_WORD, len(caption.encode("utf-8", "replace")) / BYTES_PER_TOKEN))


def find_remarks(
    verdicts: Sequence[Verdict], looks: Sequence[Look | None], caption_tokens: int, place: Callable[[Verdict], str]
) -> list[tuple[Remark, ...]]:
    """The remarks on each verdict; only files that are trained or held out by themselves have some.

    `caption_tokens`: what the model reads of a caption, 0: not known. `place`: what messages call a file.
    """
    found: list[list[Remark]] = [[] for _ in verdicts]
    for number, remark in [*_same_files(verdicts, place), *_similar(verdicts, looks, place)]:
        found[number].append(remark)
    for own, verdict, look in zip(found, verdicts, looks, strict=True):
        if verdict.item is not None and verdict.facts is not None:
            own += _of_item(verdict.item, verdict.facts, caption_tokens)
            own += _of_look(verdict.item, look) if look else []
    return [tuple(remarks) for remarks in found]


def equal_captions(verdicts: Sequence[Verdict], entries: Sequence[DatasetEntry]) -> list[str]:
    """A line for each entry whose files have captions of their own that are all the same."""
    lines = []
    for entry in entries:
        if not isinstance(entry, CaptionedEntry) or entry.caption_strategy == "instanceprompt":
            continue
        captions = [verdict.item.caption for verdict in verdicts if verdict.item is not None and verdict.dataset == entry.id]
        if len(captions) > 1 and len(set(captions)) == 1:
            lines.append(f"{entry.id}: all {len(captions)} captions are the same: {_shortened(captions[0])}")
    return lines


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN].rstrip() + "…"


# --- of several files ----------------------------------------------------------------------------------------------
def _same_files(verdicts: Sequence[Verdict], place: Callable[[Verdict], str]) -> list[tuple[int, Remark]]:
    """Files of equal content. One file that stands in several entries is no duplicate, but is named where it is held out and trained."""
    found: list[tuple[int, Remark]] = []
    first: dict[tuple[str, str], Verdict] = {}
    trained = {v.item.content: v for v in reversed(verdicts) if v.item is not None and v.status == "used"}
    for number, verdict in enumerate(verdicts):
        if verdict.item is None:
            continue
        if verdict.status == "held out" and (other := trained.get(verdict.item.content)) is not None:
            found.append((number, Remark("held out and trained", f"trained as well: {place(other)}")))
        known = first.setdefault((verdict.item.content, verdict.status), verdict)
        if known.path != verdict.path:
            found.append((number, Remark("duplicate", f"the same file as {place(known)}")))
    return found


def _similar(
    verdicts: Sequence[Verdict], looks: Sequence[Look | None], place: Callable[[Verdict], str]
) -> list[tuple[int, Remark]]:
    """Clips, and pictures, that show nearly the same. Of equal files only the first is compared."""
    found = []
    for kind in ("video", "image"):
        first: dict[str, tuple[int, tuple[Hash, ...]]] = {}
        for number, (verdict, look) in enumerate(zip(verdicts, looks, strict=True)):
            if verdict.item is not None and verdict.item.kind == kind and look is not None:
                first.setdefault(verdict.item.content, (number, look.seen[0].hashes))
        numbers = [number for number, _ in first.values()]
        for index, other in first_similar([hashes for _, hashes in first.values()]).items():
            found.append((numbers[index], Remark("near duplicate", f"shows nearly the same as {place(verdicts[numbers[other]])}")))
    return found


# --- of one file ---------------------------------------------------------------------------------------------------
def _of_item(item: Item, facts: MediaFacts, caption_tokens: int) -> list[Remark]:
    """What headers and captions tell."""
    remarks = []
    if caption_tokens and (tokens := estimate_tokens(item.caption)) > caption_tokens:
        remarks.append(Remark("long caption", f"its caption has about {tokens} tokens, the model reads {caption_tokens}"))
    if item.kind == "audio":
        return remarks
    scale = max(item.bucket.width / facts.width, item.bucket.height / facts.height)
    if scale >= ENLARGED:
        sizes = f"from {facts.width}x{facts.height} to {item.bucket.width}x{item.bucket.height}"
        remarks.append(Remark("enlarged", f"enlarged {scale:.1f} times, {sizes}"))
    if item.kind == "video" and 0 < facts.fps < REPEATED * item.frame_rate:
        remarks.append(Remark("repeated frames", f"{facts.fps:.4g} frames/s are shown at {item.frame_rate:g}, so frames are repeated"))
    return remarks


def _of_look(item: Item, look: Look) -> list[Remark]:
    """What decoding tells."""
    companion = item.companion("sound")
    sound = f"its sound ({companion.path.name})" if companion else "its sound"
    own = _of_picture(item, look.seen[0]) if look.seen else []
    return own + (_of_sound(look.heard, sound) if look.heard else [])


def _of_picture(item: Item, seen: Seen) -> list[Remark]:
    remarks = []
    if seen.brightness < DARK:
        remarks.append(Remark("dark", f"very dark: {seen.brightness:.1%} of full brightness on average"))
    if item.bucket.frames > 1 and seen.motion < STATIC:
        remarks.append(Remark("static", f"nothing moves in {item.bucket.frames} frames"))
    return remarks


def _of_sound(heard: Heard, sound: str) -> list[Remark]:
    if heard.loudness is None:
        return [Remark("silent", f"{sound} is silent")]
    return [Remark("clipped", f"{heard.clipped:.2%} of {sound} is clipped")] if heard.clipped >= CLIPPED else []
