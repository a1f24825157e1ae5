"""Captions to what the transformer reads: Gemma 3's hidden states, through the checkpoint's connectors.

Special here: what is cached comes after the connectors, so training needs neither them nor Gemma; raw hidden states would be 385 MB a
caption. Only Gemma's language model is read from its files, without head and image tower, whatever class saved them.

Dimensions: B captions, T tokens (1,024), E Gemma's width, N layers and one, D width of a stream's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma3Config, Gemma3TextConfig, Gemma3TextModel
from transformers.utils import logging as transformers_logging

from tuner.errors import CheckpointError
from tuner.interfaces.encoders import LatentEncoder, Record, Source
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import build_part, fingerprint_folder, has_tokenizer
from tuner_ltxvideo2.stored import StoredTensor, read_header, weight_files

MAX_TOKENS: Final = 1024
VERSION: Final = 1
"""Raised when the same caption and weights would give other records."""
_ANCHOR: Final = "embed_tokens.weight"
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TextEncoder(LatentEncoder):
    """Captions -> {"video": (T, D), "audio": (T, D)} in `dtype`; `folder`: a Gemma 3, else the one beside the checkpoint."""

    name: ClassVar[str] = "text"
    reads: ClassVar[Literal["video", "audio", "text"]] = "text"

    def __init__(self, source: WeightSource, variant: Variant, dtype: torch.dtype, folder: Path | None = None) -> None:
        self._source = source
        self._variant = variant
        self._dtype = dtype
        self._folder = text_encoder_folder(source, folder)
        self._tokenizer_folder = tokenizer_folder(source, self._folder)
        self._config = read_gemma_config(self._folder, variant)
        self._tokenizer: Any = None
        self._gemma: Any = None
        self._connectors: nn.Module | None = None
        self._device = torch.device("cpu")

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {
            "text_encoder": fingerprint_folder(self._folder),
            "tokenizer": fingerprint_tokenizer(self._tokenizer_folder),
            "connectors": self._source.fingerprint("connectors"),
            "dtype": str(self._dtype),
            "version": VERSION,
        }

    def load(self, device: torch.device) -> None:
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_folder, local_files_only=True)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._gemma = load_gemma(self._folder, self._config, self._dtype, device)
        self._connectors = build_part(self._source, "connectors", self._variant, dtype=self._dtype, device=device)

    def unload(self) -> None:
        self._tokenizer = self._gemma = self._connectors = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        captions = [source.strip() for source in sources if isinstance(source, str)]
        assert len(captions) == len(sources), "this encoder reads text"
        ids, mask, dropped = self._tokenize(captions)
        video, audio = self._embed(ids.to(self._device), mask.to(self._device))
        return [
            Record(
                {"video": video[i].cpu(), "audio": audio[i].cpu()}, {"tokens": str(int(mask[i].sum())), "truncated_tokens": str(dropped[i])}
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
        assert self._connectors is not None, "load() comes first"
        states = self._gemma(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        stacked = torch.stack(states, dim=-1)  # (B, T, E, N), which is how the connectors' projection is laid out
        video, audio, _ = self._connectors(stacked.to(self._dtype), mask, padding_side="left")
        return video, audio


# --- the files ---------------------------------------------------------------------------------------------------
def text_encoder_folder(source: WeightSource, given: Path | None) -> Path:
    """Where Gemma lies: as given, or beside the checkpoint. Raises `CheckpointError`."""
    folder = given or source.folder("text_encoder")
    if folder is None:
        raise CheckpointError(
            "the checkpoint brings no text encoder", where="text_encoder_path", value=source.description,
            remedy="set text_encoder_path to a Gemma 3 12B: a folder or a hub repository",
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


def read_gemma_config(folder: Path, variant: Variant) -> Gemma3TextConfig:
    """The language model's configuration. Raises `CheckpointError` unless it is the Gemma 3 that the connectors were trained with."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError("the text encoder has no readable config.json", where="text_encoder_path", value=folder.name) from error
    connectors = variant.config.get("connectors", {})
    width, layers = connectors.get("caption_channels"), int(str(connectors.get("text_proj_in_factor", 1))) - 1
    needed = f"a Gemma 3 with {layers} layers of width {width}"
    if kind not in ("gemma3", "gemma3_text"):
        raise CheckpointError(
            f"LTX-{variant.name} needs {needed}", where="text_encoder_path", value=f"model_type {kind}", remedy="give that one"
        )
    config = Gemma3Config.from_pretrained(folder).text_config if kind == "gemma3" else Gemma3TextConfig.from_pretrained(folder)
    if (config.hidden_size, config.num_hidden_layers) != (width, layers):
        raise CheckpointError(
            f"this checkpoint needs {needed}",
            where="text_encoder_path",
            value=f"{config.num_hidden_layers} layers of width {config.hidden_size}",
            remedy="give that one: for the published models Gemma 3 12B",
        )
    return config


def load_gemma(folder: Path, config: Gemma3TextConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The language model alone (`Gemma3TextModel`), from files saved by any Gemma 3 class. Raises `CheckpointError` for missing weights."""
    stored = {key: tensor for file in weight_files(folder) for key, tensor in read_header(file).tensors.items()}
    prefix = next((key.removesuffix(_ANCHOR) for key in stored if key.endswith(_ANCHOR)), None)
    if prefix is None:
        raise CheckpointError("the text encoder's weights hold no language model", where="text_encoder_path", value=folder.name)
    with torch.device("meta"):
        needed = Gemma3TextModel(config).state_dict().keys()
    missing = [name for name in needed if prefix + name not in stored]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights of the text encoder are missing",
            where="text_encoder_path",
            value=missing[:8],
            remedy="download it again",
        )
    weights = _read({name: stored[prefix + name] for name in needed})
    with without_progress():
        model = Gemma3TextModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, device_map={"": device})
    return model.eval().requires_grad_(False)


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


def _read(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Memory-mapped tensors by name."""
    found: dict[str, Tensor] = {}
    for file in {tensor.file for tensor in stored.values()}:
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(tensor.key) for name, tensor in stored.items() if tensor.file == file}
    return found


def fingerprint_tokenizer(folder: Path) -> str:
    """Identity of a tokenizer: the bytes of its files."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()
