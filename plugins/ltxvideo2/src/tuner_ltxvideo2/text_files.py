"""What a text encoder's files say: which Gemma it is, and its tokenizer.

Two layouts: a folder as transformers saves it, or one .safetensors file with the configuration in its metadata (`gemma_config`) and
the tokenizer.json as a tensor of bytes, in which LTX-2.5 is published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma3TextModel,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedTextModel,
    PreTrainedTokenizerFast,
)

from tuner.errors import CheckpointError
from tuner.interfaces.family import Variant
from tuner.model.stored import read_bytes, read_header
from tuner_ltxvideo2.loading import TOKENIZER_KEY

GemmaConfig: TypeAlias = Gemma3TextConfig | Gemma4UnifiedTextConfig
GemmaModel: TypeAlias = Gemma3TextModel | Gemma4UnifiedTextModel

_GENERATIONS: Final = {"gemma3": "Gemma 3", "gemma3_text": "Gemma 3", "gemma4_unified": "Gemma 4", "gemma4_unified_text": "Gemma 4"}
"""By `model_type`. Gemma 4's other architecture (`gemma4`) has layers that the connectors were not trained on."""
_CLASSES: Final[Mapping[str, Any]] = {
    "gemma3": Gemma3Config, "gemma3_text": Gemma3TextConfig,
    "gemma4_unified": Gemma4UnifiedConfig, "gemma4_unified_text": Gemma4UnifiedTextConfig,
}  # fmt: skip
_PUBLISHED: Final = {"Gemma 3": "Gemma 3 12B", "Gemma 4": "the Gemma 4 12B of the LTX-2.5 repository"}
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_gemma_config(place: Path, variant: Variant) -> GemmaConfig:
    """The language model's configuration. Raises `CheckpointError` unless it is the Gemma that the connectors were trained with."""
    table = _read_table(place)
    kind = str(table.get("model_type", ""))
    connectors = variant.config.get("connectors", {})
    width, layers = connectors.get("caption_channels"), int(str(connectors.get("text_proj_in_factor", 1))) - 1
    generation = "Gemma 4" if variant.name == "2.5" else "Gemma 3"
    needed = f"a {generation} with {layers} layers of width {width}"
    if _GENERATIONS.get(kind) != generation:
        raise CheckpointError(
            f"LTX-{variant.name} needs {needed}", where="text_encoder_path", value=f"model_type {kind}",
            remedy=f"give that one: for the published models {_PUBLISHED[generation]}",
        )  # fmt: skip
    found = _CLASSES[kind].from_dict(table)
    config: GemmaConfig = getattr(found, "text_config", found)
    if (config.hidden_size, config.num_hidden_layers) != (width, layers):
        raise CheckpointError(
            f"this checkpoint needs {needed}",
            where="text_encoder_path",
            value=f"{config.num_hidden_layers} layers of width {config.hidden_size}",
            remedy=f"give that one: for the published models {_PUBLISHED[generation]}",
        )
    return config


def gemma_model(config: GemmaConfig) -> GemmaModel:
    """The language model that `config` describes, as its class initializes it."""
    return Gemma4UnifiedTextModel(config) if isinstance(config, Gemma4UnifiedTextConfig) else Gemma3TextModel(config)


def load_tokenizer(place: Path) -> Any:
    """The tokenizer of a folder, or the one embedded in a file; pads on the left."""
    tokenizer = _embedded_tokenizer(place) if place.is_file() else AutoTokenizer.from_pretrained(place, local_files_only=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint_tokenizer(place: Path) -> str:
    """Identity of a tokenizer: the bytes of its files."""
    if place.is_file():
        return hashlib.sha256(_embedded_bytes(place)).hexdigest()
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (place / name).is_file():
            digest.update(name.encode() + hashlib.sha256((place / name).read_bytes()).digest())
    return digest.hexdigest()


def _read_table(place: Path) -> dict[str, Any]:
    try:
        text = read_header(place).metadata["gemma_config"] if place.is_file() else (place / "config.json").read_text(encoding="utf-8")
        return dict(json.loads(text))
    except (OSError, ValueError, KeyError) as error:
        missing = "configuration in its metadata" if place.is_file() else "readable config.json"
        raise CheckpointError(f"the text encoder has no {missing}", where="text_encoder_path", value=place.name) from error


def _embedded_bytes(file: Path) -> bytes:
    return read_bytes(read_header(file).tensors[TOKENIZER_KEY])


def _embedded_tokenizer(file: Path) -> Any:
    """Its special tokens are those that the configuration numbers, its longest text is the model's."""
    core = Tokenizer.from_str(_embedded_bytes(file).decode())
    table = _read_table(file)
    numbers = {**table, **dict(table.get("text_config") or {})}
    special: dict[str, Any] = {"model_max_length": numbers["max_position_embeddings"]} if "max_position_embeddings" in numbers else {}
    for name in ("bos_token", "eos_token", "pad_token"):
        number = numbers.get(f"{name}_id")
        first = number[0] if isinstance(number, list) else number
        if isinstance(first, int):
            special[name] = core.id_to_token(first)
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)
