"""The keys that say where frozen weights live. They change what a run costs and never what it computes."""

from __future__ import annotations

from typing import ClassVar, Literal

from tuner.config.options import Options, option


class GroupOffloadOptions(Options):
    """Groups of blocks, or leaf modules, brought to the device in turn."""

    title: ClassVar[str] = "Group offload"
    changes_numbers: ClassVar[bool] = False

    enable_group_offload: bool = option(
        False, help="Keep the transformer's frozen weights in host memory and bring them group by group.",
        ask="Keep the frozen weights in host memory and bring them to the GPU group by group?",
        effect="The least GPU memory: two blocks lie there at a time. Host memory must hold the weights, and a step may take longer.",
    )
    group_offload_type: Literal["block_level", "leaf_level"] = option(
        "block_level", help="Unit of a group: consecutive blocks, or single layers."
    )
    group_offload_blocks_per_group: int = option(1, help="How many blocks make a group, with `block_level`.", ge=1)
    group_offload_use_stream: bool = option(
        False, help="Copy the next group beside the computation; takes memory for one group more.", suggest=True,
        ask="Copy the next group while the present one is computed?", effect="Faster, for the memory of one group more.",
    )
    group_offload_to_disk_path: str = option(
        "", help="Keep the groups in files in this folder in place of host memory.", metavar="FOLDER"
    )
    group_offload_text_encoder: bool = option(False, help="The same for the text encoder.")
    group_offload_vae: bool = option(False, help="The same for the VAE, layer by layer.")

    def enabled(self) -> bool:
        return self.enable_group_offload or self.group_offload_text_encoder or self.group_offload_vae


class BlockSwapOptions(Options):
    """A number of blocks streamed, the rest resident."""

    title: ClassVar[str] = "Block swap"
    changes_numbers: ClassVar[bool] = False

    musubi_blocks_to_swap: int = option(
        0, help="How many of the transformer's blocks are kept in host memory; 0 for none.", unit="blocks", ge=0,
        ask="Of the transformer's blocks, how many are kept in host memory?",
        effect="Each leaves the memory of one block on the GPU, and costs time to bring; at least one block stays there.",
    )
    musubi_block_swap_device: str = option("cpu", help="Where those blocks are kept; the host (`cpu`) is the only place.")

    def enabled(self) -> bool:
        return self.musubi_blocks_to_swap > 0


class RamTorchOptions(Options):
    """Linear layers streamed one by one."""

    title: ClassVar[str] = "RamTorch"
    changes_numbers: ClassVar[bool] = False

    ramtorch: bool = option(
        False, help="Keep the transformer's linear layers in host memory and bring them one by one.",
        ask="Keep single linear layers in host memory?", effect="Finer than whole blocks; which layers, `ramtorch_target_modules` says.",
    )
    ramtorch_text_encoder: bool = option(False, help="The same for the text encoder.")
    ramtorch_vae: bool = option(False, help="The same for the VAE, convolutions included.")
    ramtorch_target_modules: list[str] | str | None = option(
        None, help="Name patterns (`*.attn1.*`) of the transformer's layers to keep there, a list or separated by commas; all when empty."
    )
    ramtorch_transformer_percent: float = option(
        100.0, help="How much of the transformer's linear layers is kept there; the rest stays on the device.", unit="percent", ge=0, le=100
    )
    ramtorch_text_encoder_percent: float = option(
        100.0, help="How much of the text encoder's linear layers is kept there.", unit="percent", ge=0, le=100
    )

    def enabled(self) -> bool:
        return self.ramtorch or self.ramtorch_text_encoder or self.ramtorch_vae


class StartupOptions(Options):
    """Where weights live before training starts."""

    title: ClassVar[str] = "Start"
    changes_numbers: ClassVar[bool] = False

    offload_during_startup: bool = option(
        True, help="Always so, whatever the value: encoders are loaded one at a time and dropped before the transformer is loaded."
    )
