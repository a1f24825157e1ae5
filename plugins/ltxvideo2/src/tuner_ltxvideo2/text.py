"""Captions to what the transformer reads: Gemma 3's hidden states, through the checkpoint's connectors.

Special here: what is cached comes after the connectors, so training needs neither them nor Gemma; raw hidden states would be 385 MB a
caption. Only Gemma's language model is read from its files, without head and image tower, whatever class saved them.

Dimensions: B captions, T tokens (1,024), E Gemma's width, N layers and one, D width of a stream's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from tuner.errors import CheckpointError
from tuner.interfaces.encoders import LatentEncoder, Record, Source
from tuner.interfaces.family import Variant
from tuner.interfaces.memory import PartMemory, Placement
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.features import HiddenStates, connect, split_projections
from tuner_ltxvideo2.gemma import MEMORY_PART, Gemma
from tuner_ltxvideo2.loading import build_part, fingerprint_folder, has_tokenizer
from tuner_ltxvideo2.text_files import fingerprint_tokenizer, load_tokenizer, read_gemma_config

MAX_TOKENS: Final = 1024
VERSION: Final = 1
"""Raised when the same caption and weights would give other records."""


class TextEncoder(LatentEncoder):
    """Captions -> {"video": (T, D), "audio": (T, D)} in `dtype`; `folder`: a Gemma 3, else the one beside the checkpoint."""

    name: ClassVar[str] = "text"
    reads: ClassVar[Literal["video", "audio", "text"]] = "text"

    def __init__(
        self, source: WeightSource, variant: Variant, dtype: torch.dtype, folder: Path | None = None, memory: PartMemory | None = None
    ) -> None:
        """`memory`: says where the weights live; None: they are put on the device as they are."""
        self._source = source
        self._variant = variant
        self._dtype = dtype
        self._folder = text_encoder_folder(source, folder)
        self._tokenizer_folder = tokenizer_folder(source, self._folder)
        self._config = read_gemma_config(self._folder, variant)
        self._tokenizer: Any = None
        self._memory = memory
        self._gemma: Gemma | None = None
        self._connectors: nn.Module | None = None
        self._connectors_placement: Placement | None = None
        self._device = torch.device("cpu")

    def settings(self) -> Mapping[str, str | int | float | bool]:
        precision = self._memory.precision(MEMORY_PART) if self._memory is not None else "no_change"
        return {
            **({} if precision == "no_change" else {"precision": precision}),
            "text_encoder": fingerprint_folder(self._folder),
            "tokenizer": fingerprint_tokenizer(self._tokenizer_folder),
            "connectors": self._source.fingerprint("connectors"),
            "dtype": str(self._dtype),
            "version": VERSION,
        }

    def load(self, device: torch.device) -> None:
        self._device = device
        self._tokenizer = load_tokenizer(self._tokenizer_folder)
        self._gemma = Gemma(self._folder, self._config, self._dtype, device, self._memory)
        self._load_connectors(device)

    def _load_connectors(self, device: torch.device) -> None:
        """Onto the device, or, where Gemma is streamed, as a module that is streamed by its linear layers (2.8 GB and more)."""
        if self._gemma is None or not self._gemma.streamed or self._memory is None:
            self._connectors = build_part(self._source, "connectors", self._variant, dtype=self._dtype, device=device)
            return
        self._connectors_placement = self._memory.open(MEMORY_PART, 0, device)
        host = torch.device("cpu")
        connectors = build_part(self._source, "connectors", self._variant, dtype=self._dtype, device=host)
        split_projections(connectors)
        self._connectors_placement.hold(connectors)
        self._connectors = connectors

    def unload(self) -> None:
        if self._gemma is not None:
            self._gemma.close()
        if self._connectors_placement is not None:
            self._connectors_placement.close()
        self._tokenizer = self._gemma = self._connectors = self._connectors_placement = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        captions = [source.strip() for source in sources if isinstance(source, str)]
        assert len(captions) == len(sources), "this encoder reads text"
        ids, mask, dropped = self._tokenize(captions)
        video, audio = self._embed(ids, mask)
        return [
            Record(
                {"video": video[i].to("cpu", copy=True), "audio": audio[i].to("cpu", copy=True)},
                {"tokens": str(int(mask[i].sum())), "truncated_tokens": str(dropped[i])}
            )
            for i in range(len(captions))
        ]

    def _tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor, list[int]]:
        """Ids and mask (B, T), left-padded, and how many tokens of each caption did not fit."""
        length = min(MAX_TOKENS, self._tokenizer.model_max_length)
        found = self._tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, add_special_tokens=True, return_tensors="pt"
        )
        whole = self._tokenizer(captions, add_special_tokens=True, truncation=True, max_length=64 * length)
        dropped = [max(0, len(ids) - length) for ids in whole.input_ids]
        return found.input_ids, found.attention_mask, dropped

    @torch.no_grad()
    def _embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Text of both streams (B, T, D)."""
        assert self._gemma is not None and self._connectors is not None, "load() comes first"
        states = HiddenStates(self._connectors, mask, self._dtype, self._device)
        self._gemma.run(ids, mask, states.add)
        return connect(self._connectors, states)


# --- the files ---------------------------------------------------------------------------------------------------
def text_encoder_folder(source: WeightSource, given: Path | None) -> Path:
    """Where Gemma lies: as given, or beside the checkpoint. Raises `CheckpointError`."""
    folder = given or source.folder("text_encoder")
    if folder is None:
        raise CheckpointError(
            "the checkpoint brings no text encoder", where="text_encoder_path", value=source.description,
            remedy="set text_encoder_path to a Gemma 3 12B (LTX-2.5: its Gemma 4 12B): a folder or a hub repository",
        )  # fmt: skip
    nested = folder / "text_encoder"
    return nested if not (folder / "config.json").is_file() and nested.is_dir() else folder


def tokenizer_folder(source: WeightSource, folder: Path) -> Path:
    """Where the tokenizer lies: with the model, beside it, or beside the checkpoint. Raises `CheckpointError`."""
    for candidate in (folder, folder.parent / "tokenizer", source.folder("tokenizer")):
        if candidate is not None and has_tokenizer(candidate):
            return candidate
    raise CheckpointError(
        "no tokenizer is found with the text encoder", where="text_encoder_path", value=folder.name, remedy="add its tokenizer.json"
    )


@contextmanager
def without_progress() -> Iterator[None]:
    """Keeps transformers' own progress bars off the terminal, which belongs to the run's status line."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
