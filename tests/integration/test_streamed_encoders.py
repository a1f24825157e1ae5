"""Text encoder, VAEs and vocoder under each memory strategy: the same records to the last bit, in the memory that was promised."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3TextConfig, Gemma3TextModel

from ltxvideo2.ltx2_published import CONNECTORS_20, CONNECTORS_23
from offload.simulated import SimulatedLink
from tuner.builtins.quantizers import Int8Torchao
from tuner.config.options import Options
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, VideoClip
from tuner.interfaces.family import BuildContext, Variant
from tuner.interfaces.memory import MemoryFacts, MemoryStrategy
from tuner.interfaces.services import WeightSource
from tuner.model.placing import RunMemory
from tuner_ltxvideo2 import text
from tuner_ltxvideo2.audio_latents import AudioDecoder, AudioLatentEncoder
from tuner_ltxvideo2.features import HiddenStates, connect, split_projections
from tuner_ltxvideo2.gemma import Gemma, empty_gemma
from tuner_ltxvideo2.loading import CombinedFile, build_part, empty_part
from tuner_ltxvideo2.text import TextEncoder, without_progress
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_ltxvideo2.variants import FAMILY, variant_of
from tuner_ltxvideo2.video_latents import VideoDecoder, VideoLatentEncoder
from tuner_offload import group, ramtorch
from tuner_offload.group import GroupOffload
from tuner_offload.leaf import SLOTS, LeafSession, candidates
from tuner_offload.options import GroupOffloadOptions, RamTorchOptions
from tuner_offload.ramtorch import RamTorch

CPU = torch.device("cpu")
CAPTIONS = ["a red ball rolls over green grass", "", "rain falls outside the window"]
GIB = 2**30

STRATEGIES: dict[str, Options] = {
    "group offload": GroupOffloadOptions(group_offload_text_encoder=True, group_offload_vae=True, group_offload_use_stream=True),
    "group offload by leaves, in line": GroupOffloadOptions(
        group_offload_text_encoder=True, group_offload_vae=True, group_offload_type="leaf_level"
    ),
    "RamTorch": RamTorchOptions(ramtorch_text_encoder=True, ramtorch_vae=True),
    "RamTorch, half": RamTorchOptions(ramtorch_text_encoder=True, ramtorch_text_encoder_percent=50, ramtorch_vae=True),
}


def strategy_of(options: Options, dtype: torch.dtype = torch.bfloat16) -> MemoryStrategy:
    context = BuildContext(CPU, dtype, 0, 0, Path())
    if isinstance(options, GroupOffloadOptions):
        return GroupOffload(options, context)
    assert isinstance(options, RamTorchOptions)
    return RamTorch(options, context)


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedLink]:
    """Strategies stream to simulated devices, and layers however small: the tiny model has no others."""
    made: list[SimulatedLink] = []

    def link_to(device: torch.device, stream: bool = True) -> SimulatedLink:
        made.append(SimulatedLink())
        return made[-1]

    for module in (group, ramtorch):
        monkeypatch.setattr(module, "link_to", link_to)
    monkeypatch.setattr(group, "LeafSession", functools.partial(LeafSession, smallest=0))
    monkeypatch.setattr(RamTorch, "smallest", 0, raising=False)
    split_by(2000, monkeypatch)
    return made


def split_by(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many bytes of the tiny projection (6 KB in bfloat16) at a time."""
    monkeypatch.setattr(text, "split_projections", functools.partial(split_projections, piece_bytes=piece_bytes))


@pytest.fixture(scope="module")
def source(tiny: TinyPaths) -> WeightSource:
    return CombinedFile().open(tiny.checkpoint, "tiny")


@pytest.fixture(scope="module")
def variant(source: WeightSource) -> Variant:
    return variant_of(source)


def run(encoder: LatentEncoder, sources: list[Any]) -> list[Record]:
    try:
        encoder.load(CPU)
        return [*encoder.encode(sources), *encoder.encode(sources[:1])]
    finally:
        encoder.unload()


def assert_equal(found: list[Record], expected: list[Record]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tensors.keys() == other.tensors.keys() and one.facts == other.facts
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


# --- the same records --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", STRATEGIES)
def test_captions_are_encoded_the_same(name: str, source: WeightSource, variant: Variant, links: list[SimulatedLink]) -> None:
    memory = RunMemory([strategy_of(STRATEGIES[name])])
    found = run(TextEncoder(source, variant, torch.bfloat16, memory=memory), CAPTIONS)
    assert_equal(found, run(TextEncoder(source, variant, torch.bfloat16), CAPTIONS))
    assert len(links) == 2 and all(link.loads > 0 and not link.slots for link in links)  # Gemma's and the connectors', both given back


def test_captions_in_float32_differ_by_the_split_projection_alone(
    source: WeightSource, variant: Variant, links: list[SimulatedLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = RunMemory([strategy_of(STRATEGIES["RamTorch"], torch.float32)])
    plain = run(TextEncoder(source, variant, torch.float32), CAPTIONS)
    split = run(TextEncoder(source, variant, torch.float32, memory=memory), CAPTIONS)
    for one, other in zip(split, plain, strict=True):  # a product with fewer rows adds up in another order
        for stream, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[stream], atol=5e-6, rtol=1e-5)
    split_by(2**20, monkeypatch)
    assert_equal(run(TextEncoder(source, variant, torch.float32, memory=memory), CAPTIONS), plain)


def test_a_quantized_text_encoder_streams_too(
    source: WeightSource, variant: Variant, links: list[SimulatedLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.builtins.quantizers.SMALLEST", 16)
    dtype = torch.bfloat16
    quantizer = {"text_encoder": Int8Torchao(Options(), BuildContext(CPU, dtype, 0, 0, Path()))}
    plain, *streamed = (
        run(TextEncoder(source, variant, dtype, memory=RunMemory(strategies, quantizer)), CAPTIONS)
        for strategies in ([], [strategy_of(STRATEGIES["RamTorch"])], [strategy_of(STRATEGIES["group offload"])])
    )
    for found in streamed:
        assert_equal(found, plain)
    unquantized = run(TextEncoder(source, variant, dtype), CAPTIONS)[0]
    assert not torch.equal(plain[0].tensors["video"], unquantized.tensors["video"])


@pytest.mark.parametrize("name", ["group offload", "RamTorch"])
def test_pictures_and_sound_are_coded_the_same(name: str, source: WeightSource, variant: Variant, links: list[SimulatedLink]) -> None:
    memory, draw = RunMemory([strategy_of(STRATEGIES[name])]), torch.Generator().manual_seed(0)
    clip = VideoClip(torch.randint(0, 256, (9, 64, 64, 3), generator=draw, dtype=torch.uint8), 25.0)
    sound = AudioClip(torch.rand(2, 6000, generator=draw) - 0.5, 16000, 6000)
    plain = run(VideoLatentEncoder(source, variant, torch.float32), [clip])
    assert_equal(run(VideoLatentEncoder(source, variant, torch.float32, memory=memory), [clip]), plain)
    heard = run(AudioLatentEncoder(source, variant, torch.float32), [sound])
    assert_equal(run(AudioLatentEncoder(source, variant, torch.float32, memory), [sound]), heard)
    latents = plain[0].tensors["latents"][None]
    decoded = [decode(VideoDecoder(source, variant, torch.float32, memory=each), latents) for each in (None, memory)]
    assert torch.equal(decoded[0].frames, decoded[1].frames)
    sounds = [decode(AudioDecoder(source, variant, torch.float32, each), heard[0].tensors["latents"][None]) for each in (None, memory)]
    assert torch.equal(sounds[0].samples, sounds[1].samples)
    assert len(links) >= 5 and all(link.loads > 0 and not link.slots for link in links)


def decode(decoder: Any, latents: Tensor) -> Any:
    try:
        decoder.load(CPU)
        return decoder.decode(latents)
    finally:
        decoder.unload()


# --- what is where -----------------------------------------------------------------------------------------------
def test_hidden_states_and_text_are_those_of_transformers_and_diffusers(tiny: TinyPaths, source: WeightSource, variant: Variant) -> None:
    encoder = TextEncoder(source, variant, torch.bfloat16)
    encoder.load(CPU)
    ids, mask, _ = encoder._tokenize(CAPTIONS)
    with without_progress(), torch.no_grad():
        model = Gemma3TextModel.from_pretrained(tiny.text_encoder, dtype=torch.bfloat16)
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        connectors: Any = build_part(source, "connectors", variant, dtype=torch.bfloat16, device=CPU)
        video, audio, _ = connectors(torch.stack(expected, dim=-1), mask, padding_side="left")
        found: dict[int, Tensor] = {}
        assert encoder._gemma is not None
        encoder._gemma.run(ids, mask, lambda index, hidden: found.update({index: hidden.clone()}))
        text_of_streams = encoder._embed(ids, mask)
    assert len(found) == len(expected) and all(torch.equal(found[index], state) for index, state in enumerate(expected))
    assert torch.equal(text_of_streams[0], video) and torch.equal(text_of_streams[1], audio)
    encoder.unload()


def test_only_the_embedding_and_the_layers_stay_in_host_memory(tiny: TinyPaths, links: list[SimulatedLink]) -> None:
    config = Gemma3TextConfig.from_pretrained(tiny.text_encoder)
    memory = RunMemory([strategy_of(STRATEGIES["RamTorch"])])
    gemma = Gemma(tiny.text_encoder, config, torch.float32, torch.device("meta"), memory)
    assert gemma.streamed
    inside = {name for name, parameter in gemma._model.named_parameters() if parameter.device.type == "cpu"}
    linears = {f"{name}.weight" for name, layer in gemma._model.named_modules() if isinstance(layer, nn.Linear)}
    assert inside == linears | {"embed_tokens.weight"}
    gemma.close()


# --- 4 GiB for a text encoder of 12 billion parameters -----------------------------------------------------------
class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, on the meta device too. What was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage()._cdata, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)


@functools.cache
def gemma_12b() -> Gemma3TextModel:
    """Gemma 3 12B as published, but two of its 48 layers, without storage."""
    config = Gemma3TextConfig(
        vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
        head_dim=256, sliding_window=1024, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return empty_gemma(config).to(torch.bfloat16)


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def weight_bytes(options: Options, connectors: nn.Module, layers: int = 48) -> int:
    """Of weights on the device at the same time, as planned: of Gemma's layers, and of the connectors held beside them."""
    layer = gemma_12b().layers[0]
    linears = tuple(one.size for one in candidates(layer, trained=False, smallest=0))
    sizes = (bytes_of(layer),) * layers
    planned = strategy_of(options).plan(MemoryFacts(sizes, False, "no_change", "none", 1, "text_encoder", linear_bytes=linears))
    streamed = [one.size for one in candidates(connectors, trained=False)]
    return planned.device_bytes + bytes_of(connectors) - sum(streamed) + SLOTS * max(streamed) + bytes_of(gemma_12b().norm)


def working_bytes(connectors: Any, tokens: int = 1024) -> int:
    """Of everything else while one caption is encoded, counted on tensors of real size without storage."""
    meta, gemma = torch.device("meta"), gemma_12b()
    gemma.rotary_emb.to(meta)
    with torch.no_grad(), LiveBytes() as live:
        states = HiddenStates(connectors, torch.ones(1, tokens, dtype=torch.int64, device=meta), torch.bfloat16, meta)
        hidden = torch.empty(1, tokens, 3840, dtype=torch.bfloat16, device=meta)
        mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device=meta)
        positions = torch.arange(tokens, device=meta)[None]
        table = gemma.rotary_emb(hidden, positions, "full_attention")
        for index, layer in enumerate(gemma.layers):
            states.add(index, hidden)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=table, position_ids=positions)
        connect(connectors, states)
    return live.most


@pytest.mark.parametrize("arguments", [CONNECTORS_20, CONNECTORS_23], ids=["2.0", "2.3"])
def test_a_caption_takes_4_gib_with_either_strategy(arguments: dict[str, object]) -> None:
    connectors = empty_part("connectors", Variant(FAMILY, "", {"connectors": arguments})).to(torch.bfloat16)
    split_projections(connectors)
    assert 48 * bytes_of(gemma_12b().layers[0]) > 21e9 and bytes_of(connectors) > 2.8e9  # what there is to stream
    working = working_bytes(connectors)
    assert working > 49 * 1024 * 3840 * 2  # all hidden states, once
    for name in ("group offload", "RamTorch", "group offload by leaves, in line"):
        peak = weight_bytes(STRATEGIES[name], connectors) + working
        assert peak <= 4 * GIB, f"{name}: {peak / GIB:.2f} GiB"
