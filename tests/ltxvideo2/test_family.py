"""The family on the tiny checkpoint: inspecting, loading one or both streams, targets, a whole step, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ltxvideo2.ltx2_flavour import FlavourWritten
from ltxvideo2.ltx2_models import batch_and_noise, normal, transformer
from ltxvideo2.ltx2_published import modules
from tuner.component import Component
from tuner.config.settings import AdapterSettings, ModelSettings
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Batch, BuildContext, Noise, Sample, StreamNoise
from tuner.interfaces.services import WeightSource
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner_ltxvideo2 import family as families
from tuner_ltxvideo2.loading import CombinedFile
from tuner_ltxvideo2.options import LTX2Options

torch.set_num_threads(1)
CPU = torch.device("cpu")
BOTH = ("video", "audio")


def make_family(text_encoder: Path | None = None, dtype: torch.dtype = torch.float32, **options: object) -> families.LTX2Family:
    return families.LTX2Family(LTX2Options(**options), BuildContext(CPU, dtype, 3, 0, Path()), text_encoder)


def test_component_factory_is_this_class() -> None:
    component = Component("ltxvideo2", "", LTX2Options, "tuner_ltxvideo2.family:LTX2Family")
    assert component.load() is families.LTX2Family


@pytest.mark.parametrize("streams", [BOTH, ("video",), ("audio",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_tells_what_load_brings(source20: WeightSource, streams: tuple[str, ...], dtype: torch.dtype) -> None:
    family = make_family(dtype=dtype)
    facts = family.inspect(source20, streams)
    model = family.load(source20, streams, dtype, CPU)
    blocks = family.block_set(model)
    assert facts.variant.name == "2.0"
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert facts.blocks == len(blocks)
    assert facts.block_bytes == max(blocks.frozen_bytes(i) for i in range(len(blocks)))
    assert facts.adapter_targets == len(family.adapter_targets(model, streams))
    assert blocks.names[0] == "transformer_blocks.0"
    assert not [name for name, p in model.named_parameters() if p.is_meta], "nothing is left without weights"
    assert not [name for name, p in model.named_parameters() if p.dtype != dtype]


def test_locate_finds_the_tiny_model_and_its_text_encoder(flavour_written: FlavourWritten) -> None:
    family = make_family()
    located = family.locate(ModelSettings(model_flavour="tiny"), flavour_written.cache)
    assert located.weights == flavour_written.paths.checkpoint
    assert located.weights.is_file()
    assert str(flavour_written.cache) not in located.description
    opened = CombinedFile().open(located.weights, located.description)
    assert [encoder.name for encoder in family.encoders(opened, BOTH)] == ["text", "video", "audio"]
    assert [encoder.name for encoder in family.encoders(opened, ("video",))] == ["text", "video"]


def test_options_choose_streams_and_weights() -> None:
    assert make_family().select_streams(frozenset(BOTH)) == BOTH
    assert make_family(train_audio=False).select_streams(frozenset(BOTH)) == ("video",)
    assert make_family().select_streams(frozenset({"video"})) == ("video",)
    assert make_family(audio_loss_weight=0.5).stream_weights() == {"audio": 0.5}
    assert families.LTX2Family.token_shift.mu(4096) == pytest.approx(2.05)


# --- targets -----------------------------------------------------------------------------------------------------
def test_default_targets_at_real_size() -> None:
    family, model = make_family(), modules("2.0")["transformer"]
    targets = family.adapter_targets(model, BOTH)
    attention = [name for name in targets if name.endswith(families.ATTENTION_TARGETS)]
    assert len(attention) == 1152  # 48 blocks · 6 attentions · 4
    assert len(targets) == 1252  # + 48 · 2 of audio_ff, 2 audio projections, 2 of the audio caption
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in targets)
    assert len(set(targets)) == len(targets)
    newer = transformer("2.3", layers=2)
    assert len(family.adapter_targets(newer, BOTH)) == 2 * 26 + 2  # no caption projection, so 1,250 with 48 blocks


def test_one_stream_targets_no_module_of_the_other_nor_between() -> None:
    family, model = make_family(), transformer("2.0", layers=2)
    video, audio = (family.adapter_targets(model, (name,)) for name in BOTH)
    assert len(video) == 2 * 2 * 4
    assert not [name for name in video if "audio" in name]
    assert len(audio) == 2 * (2 * 4 + 2) + 4
    assert not [name for name in audio if ".audio_attn" not in name and ".audio_ff" not in name and not name.startswith("audio_")]


def test_names_go_both_ways() -> None:
    family = make_family()
    for name in ("transformer_blocks.3.audio_to_video_attn.to_out.0", "audio_proj_in", "time_embed.linear", "scale_shift_table"):
        assert family.module_name(family.original_name(name)) == name
    assert family.original_name("audio_proj_in") == "audio_patchify_proj"


# --- a whole step ------------------------------------------------------------------------------------------------
def noised(batch: Batch, sigma: float = 0.6) -> Noise:
    streams = {}
    for index, (name, stream) in enumerate(batch.streams.items()):
        eps = normal(*stream.latents.shape, seed=index)
        level = torch.full((len(batch.samples),), sigma)
        streams[name] = StreamNoise(level, (1 - sigma) * stream.latents + sigma * eps, eps - stream.latents, eps)
    return Noise(streams)


@pytest.mark.parametrize("streams", [BOTH, ("video",), ("audio",)])
def test_cached_records_become_a_prediction(source20: WeightSource, streams: tuple[str, ...]) -> None:
    family = make_family(i2v_conditioning_probability=1.0)
    width = family.inspect(source20, BOTH).variant.config["transformer"]["caption_channels"]
    assert isinstance(width, int)
    records = {
        "video": Record({"latents": normal(128, 2, 2, 3, seed=1)}),
        "audio": Record({"latents": normal(9, 128, seed=2), "mask": torch.ones(9)}),
        "text": Record({name: normal(64, width, seed=3) for name in BOTH}),
    }
    sample = Sample(key="c", dataset="d", draw=0, epoch=0, frame_rate=25.0, frames=9, height=64, width=96, records=records)
    batch = family.collate([sample, dataclasses.replace(sample, draw=1, frame_rate=24.0)], streams)
    model = family.load(source20, streams, torch.float32, CPU)
    with torch.no_grad():
        state = family.enter(model, batch, noised(batch))
        if "video" in streams:
            protected = state.streams["video"].protected
            assert protected is not None and protected[:, :6].all() and not protected[:, 6:].any()
        for block in family.block_set(model).blocks:
            state = family.call_block(block, state)
        prediction = family.exit(model, state).streams
    assert tuple(prediction) == streams
    for name, values in prediction.items():
        assert values.shape == batch.streams[name].latents.shape
        assert values.isfinite().all()


@pytest.mark.parametrize("streams", [BOTH, ("video",)])
def test_recomputing_runner_gives_the_gradients_of_the_plain_loop(source20: WeightSource, streams: tuple[str, ...]) -> None:
    """LoRA on every default target, a missing sound and a conditioned frame, all blocks recomputed in backward."""
    family = make_family()
    model = family.load(source20, streams, torch.float32, CPU)
    add_adapters(model, family.adapter_targets(model, streams), AdapterSettings(lora_rank=2), seed=0)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = normal(*parameter.shape, seed=index) * 0.1  # zero at the start, which would hide A's gradient
    conditioned = torch.arange(24).expand(2, 24) < 8
    given = batch_and_noise(
        model, {name: (0.7, 0.4) for name in streams}, conditioned=conditioned, present=torch.tensor([True, False])
    )

    def gradients(run: Callable[[BlockState], BlockState]) -> list[torch.Tensor]:
        model.zero_grad()
        prediction = family.exit(model, run(family.enter(model, *given))).streams
        torch.stack([values.square().mean() for values in prediction.values()]).sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    def plain(state: BlockState) -> BlockState:
        for block in blocks.blocks:
            state = family.call_block(block, state)
        return state

    blocks = family.block_set(model)
    runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(len(blocks)))
    expected, captured = gradients(plain), gradients(runner.run)
    assert len(captured) == len(expected) > 0
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-5)


def test_tables_are_reused_from_step_to_step() -> None:
    family, model = make_family(), transformer()
    given = batch_and_noise(model, {"video": (0.5, 0.5)}, rates=(25.0, 25.0))

    def cosine(state: BlockState) -> int:
        return state.streams["video"].aligned["rope_cos"].tensor.data_ptr()

    assert cosine(family.enter(model, *given)) == cosine(family.enter(model, *given))
