"""RamTorch: the linear layers of a part are streamed one by one, all of them, those of given names, or a share.

Special here: a share is spread evenly by bytes over the layers in their order, so that resident layers give the copies of streamed ones
time everywhere along a pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import nn

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemorySession, MemoryStrategy
from tuner_offload.forecast import forecast_layers, full_finetuning_problem, host_memory_problem, unknown
from tuner_offload.leaf import SLOTS, SMALLEST, Candidate, LeafSession
from tuner_offload.options import RamTorchOptions
from tuner_offload.transfer import Link, link_to

if TYPE_CHECKING:
    from tuner.interfaces.family import BuildContext

KEYS: Final = {"transformer": "ramtorch", "text_encoder": "ramtorch_text_encoder", "vae": "ramtorch_vae"}
"""Part -> the key that asks for it."""
TARGETS_KEY: Final = "ramtorch_target_modules"


class Share:
    """Takes so many percent of the bytes that come along, spread evenly: a layer is taken when that keeps the share at or below."""

    def __init__(self, percent: float) -> None:
        self._percent = percent
        self._seen = self._taken = 0

    def take(self, size: int) -> bool:
        """Whether the next layer, of `size` bytes, is taken."""
        self._seen += size
        if (self._taken + size) * 100 > self._seen * self._percent:
            return False
        self._taken += size
        return True


class RamTorchChoice:
    """Which linear layers are streamed: those whose name fits one of `patterns` (none: all), of these a share."""

    def __init__(self, patterns: Sequence[str] = (), percent: float = 100.0) -> None:
        self._patterns = tuple(patterns)
        self._share = Share(percent)
        self.unused = set(patterns)
        """Patterns that no layer fitted yet."""

    def __call__(self, index: int, candidates: Sequence[Candidate]) -> list[Candidate]:
        if index >= 0:
            candidates = [one for one in candidates if one.layer is None or isinstance(one.layer, nn.Linear)]
        first_words = {one.name.partition(".")[0] for one in candidates}
        named = [one for one in candidates if self._asked_for(index, one.name, first_words)]
        return [one for one in named if self._share.take(one.size)]

    def _asked_for(self, index: int, name: str, first_words: Collection[str]) -> bool:
        fitting = [pattern for pattern in self._patterns if fits(pattern, index, name, first_words)]
        self.unused.difference_update(fitting)
        return bool(fitting) or not self._patterns


def fits(pattern: str, index: int, name: str, first_words: Collection[str]) -> bool:
    """Whether `pattern` means layer `name` of block `index`: by its name inside the block, or by that in the model.

    A layer is chosen while its block is read, when the model's name for the list of blocks is not known yet. So where a pattern begins
    with a word that nothing inside the block begins with, that word is taken for it: `blocks.3.attn.*`, `*.3.attn.*`.
    """
    if fnmatchcase(name, pattern):
        return True
    lead, _, rest = pattern.partition(".")
    if any(sign in lead for sign in "*?["):
        return fnmatchcase(f"x.{index}.{name}", pattern)
    return lead not in first_words and fnmatchcase(f"{index}.{name}", rest)


class RamTorchSession(LeafSession):
    """Says which patterns no layer fitted."""

    def __init__(self, link: Link, key: str, choice: RamTorchChoice, smallest: int = SMALLEST) -> None:
        super().__init__(link, key, stream=True, choose=choice, smallest=smallest)
        self._choice = choice

    def attach(self, blocks: BlockSet) -> None:
        super().attach(blocks)
        if self._choice.unused:
            self.detach()
            names = [name for name, layer in blocks.blocks[0].named_modules() if isinstance(layer, nn.Linear)]
            raise unused_patterns(self._choice, names)


def unused_patterns(choice: RamTorchChoice, names: Sequence[str]) -> ConfigError:
    """The error for patterns that fit no layer; `names`: some layers that there are."""
    return ConfigError(
        "fits no linear layer of the model's blocks that is large enough to be streamed", where=TARGETS_KEY,
        value=", ".join(sorted(choice.unused)),
        remedy=f"give names, with * and ? for what varies, such as *.{names[0]}; there are {', '.join(names[:12])}" if names else "",
    )  # fmt: skip


class RamTorch(MemoryStrategy):
    """The strategy behind the keys `ramtorch*`."""

    name = "ramtorch"
    smallest: ClassVar[int] = SMALLEST
    """Bytes from which on a layer is streamed."""

    def __init__(self, options: RamTorchOptions, context: BuildContext) -> None:
        self.options = options
        self.device = context.device

    @classmethod
    def candidates(cls, blocks: int) -> Sequence[Mapping[str, object]]:
        """All layers."""
        return ({"ramtorch": True},)

    def keys(self, part: str) -> tuple[str, ...]:
        return (KEYS[part],)

    def parts(self) -> frozenset[str]:
        return frozenset(part for part, key in KEYS.items() if getattr(self.options, key))

    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        key = KEYS[facts.part]
        problems: list[TunerError] = [*full_finetuning_problem(facts, key)]
        if facts.linear_bytes:
            choice, streamed = self._streamed(facts)
            problems += host_memory_problem(facts, sum(map(sum, streamed)), key)
            if choice.unused and facts.linear_names:
                problems.append(unused_patterns(choice, facts.linear_names))
        return problems

    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        if not facts.linear_bytes:
            return unknown(f"{facts.part}: {'layers' if facts.part == 'vae' else 'linear layers'} stream one by one")
        _, streamed = self._streamed(facts)
        count, total = sum(map(len, streamed)), len(facts.linear_bytes) * len(facts.block_bytes)
        words = f"{count} of {total} linear layers stream one by one through {SLOTS} slots"
        return forecast_layers(facts, streamed, SLOTS, beside=True, cuda=self.device.type == "cuda", words=words)

    def _streamed(self, facts: MemoryFacts) -> tuple[RamTorchChoice, list[list[int]]]:
        """Of each block, the bytes of the layers that will be streamed."""
        choice = self._choice(facts.part)
        names = facts.linear_names or ("",) * len(facts.linear_bytes)
        large = [Candidate(name, size) for name, size in zip(names, facts.linear_bytes, strict=True) if size >= self.smallest]
        return choice, [[one.size for one in choice(index, large)] for index in range(len(facts.block_bytes))]

    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        return RamTorchSession(link_to(device), KEYS[part], self._choice(part), self.smallest)

    def _choice(self, part: str) -> RamTorchChoice:
        if part == "transformer":
            return RamTorchChoice(patterns_of(self.options.ramtorch_target_modules), self.options.ramtorch_transformer_percent)
        return RamTorchChoice((), self.options.ramtorch_text_encoder_percent if part == "text_encoder" else 100.0)


def patterns_of(value: Sequence[str] | str | None) -> tuple[str, ...]:
    """The option's patterns: a list, or separated by commas."""
    entries = value.split(",") if isinstance(value, str) else value or ()
    return tuple(entry.strip() for entry in entries if entry.strip())
