"""Gemma's language model (3, or 4 for LTX-2.5), read layer by layer to where the run wants each layer, and its hidden states,
handed out one by one.

Special here: nothing is held that is not needed. The model is made without storage; a layer is read, made smaller where a precision is
asked for, and handed to the memory strategy before the next is read. Under a strategy the embedding (262,208 x 3,840: 2 GB in
bfloat16) stays in host memory, where its rows are looked up. Hidden states go to a sink as they arise, never all 49 at once.

Dimensions: B captions, T tokens, E width, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tuner.errors import CheckpointError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.memory import PartMemory, Placement
from tuner.model.placing import RunMemory
from tuner.model.reading import memory_for
from tuner.model.stored import StoredTensor, read_header, weight_files
from tuner_ltxvideo2.quantized import read_weights, with_scales
from tuner_ltxvideo2.text_files import GemmaConfig, GemmaModel, gemma_model

MEMORY_PART: Final = "text_encoder"
"""What memory strategies and precisions call it."""
_HOST: Final = torch.device("cpu")
_ANCHOR: Final = "embed_tokens.weight"
_LAYERS: Final = "layers"

Sink = Callable[[int, Tensor], None]


class Gemma:
    """The language model on `device`, from files that any class of that Gemma saved. Raises `CheckpointError` for missing weights."""

    def __init__(
        self, folder: Path, config: GemmaConfig, dtype: torch.dtype, device: torch.device, memory: PartMemory | None = None
    ) -> None:
        """`memory`: says where layers live and in which precision; None: they are put on the device as they are."""
        self.device = device
        self._placement = (memory or RunMemory()).open(MEMORY_PART, config.num_hidden_layers, device)
        try:
            self._model: Any = load_gemma(folder, config, dtype, device, self._placement)
            self._layers = tuple(self._model.layers)
            self._placement.attach(BlockSet.of(self._model, self._layers), owner=self._model)
        except BaseException:
            self._placement.close()
            raise

    @property
    def streamed(self) -> bool:
        """Whether its layers are brought to the device in turn."""
        return self._placement.streamed

    def run(self, ids: Tensor, mask: Tensor, sink: Sink) -> None:
        """Encodes ids (B, T) under mask (B, T); `sink` is given (n, hidden (B, T, E)) for n = 0 (the embedding) to N (after the norm).

        These are the N + 1 hidden states that transformers hands out: what went into each layer, and the normed last output.
        """
        embedded = self._model.embed_tokens(ids.to(self._model.embed_tokens.weight.device)).to(self.device)
        handles = [layer.register_forward_pre_hook(_sends(sink, index)) for index, layer in enumerate(self._layers)]
        try:
            found = self._model(inputs_embeds=embedded, attention_mask=mask.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        sink(len(self._layers), found.last_hidden_state)

    def close(self) -> None:
        """Lets the weights go."""
        self._placement.close()
        self._model, self._layers = None, ()


def _sends(sink: Sink, index: int) -> Callable[[nn.Module, Any], None]:
    return lambda layer, inputs: sink(index, inputs[0])


def load_gemma(folder: Path, config: GemmaConfig, dtype: torch.dtype, device: torch.device, placement: Placement) -> GemmaModel:
    """The language model alone, without head and image tower. Raises `CheckpointError` for missing weights."""
    model = empty_gemma(config)
    stored = _find(folder, model.state_dict().keys())
    embedding = _HOST if placement.streamed else device
    outside = {name: tensor for name, tensor in stored.items() if not name.startswith(_LAYERS + ".")}
    _read(model, {name: tensor for name, tensor in outside.items() if name == _ANCHOR}, dtype, embedding)
    _read(model, {name: tensor for name, tensor in outside.items() if name != _ANCHOR}, dtype, device)
    for index, layer in enumerate(model.layers):
        lead = f"{_LAYERS}.{index}."
        placement.expect(index, layer, dtype)
        _read(model, {name: tensor for name, tensor in stored.items() if name.startswith(lead)}, dtype, placement.reading)
        placement.received(index, layer.eval().requires_grad_(False))
    model.embed_tokens.embed_scale = model.embed_tokens.embed_scale.to(embedding)
    model.rotary_emb.to(device)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _read(model: nn.Module, stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> None:
    """Fills parameters and buffers by name, those without memory on `device`."""
    targets = memory_for(model, stored, lambda name: dtype, device)
    read_weights((stored[name], target) for name, target in targets.items())


def empty_gemma(config: GemmaConfig) -> GemmaModel:
    """The model without storage for its weights; buffers that no file holds have their values, on the CPU."""
    with torch.device("meta"):
        model = gemma_model(config)
    for module in model.modules():
        unsaved = module._non_persistent_buffers_set
        for name in unsaved:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=_HOST)
        if unsaved:
            model._init_weights(module)  # transformers' own values; it costs nothing for weights on the meta device
    return model


def _find(folder: Path, needed: Iterable[str]) -> dict[str, StoredTensor]:
    """The model's names -> where they lie in the files, under whatever prefix."""
    stored = {key: tensor for file in weight_files(folder) for key, tensor in with_scales(read_header(file)).tensors.items()}
    prefix = next((key.removesuffix(_ANCHOR) for key in stored if key.endswith(_ANCHOR)), None)
    if prefix is None:
        raise CheckpointError("the text encoder's weights hold no language model", where="text_encoder_path", value=folder.name)
    names = list(needed)
    missing = [name for name in names if prefix + name not in stored]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights of the text encoder are missing",
            where="text_encoder_path",
            value=missing[:8],
            remedy="download it again",
        )
    return {name: stored[prefix + name] for name in names}
