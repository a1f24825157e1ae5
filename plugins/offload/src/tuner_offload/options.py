"""The keys that say where frozen weights live. None is acted on in this version: weights stay where they are computed with.

Memory strategies change what a run costs and never what it computes, so a configuration that asks for one runs, with a notice.
"""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, unsupported

RESIDENT = "frozen weights stay on the training device"


class GroupOffloadOptions(Options):
    """Groups of blocks, or leaf modules, brought to the device in turn."""

    title: ClassVar[str] = "Group offload"

    enable_group_offload: bool = unsupported(
        help="Keep frozen weights in host memory and bring them group by group.", reason=RESIDENT, changes_results=False, default=False
    )
    group_offload_type: str = unsupported(
        help="Unit of a group: `block_level` or `leaf_level`.", reason=RESIDENT, changes_results=False, default="block_level"
    )
    group_offload_blocks_per_group: int = unsupported(help="Blocks in a group.", reason=RESIDENT, changes_results=False, default=1)
    group_offload_use_stream: bool = unsupported(
        help="Copy on a stream beside the computation.", reason=RESIDENT, changes_results=False, default=False
    )
    group_offload_to_disk_path: str = unsupported(
        help="Keep the groups in this folder instead of host memory.", reason=RESIDENT, changes_results=False, default=""
    )
    group_offload_text_encoder: bool = unsupported(
        help="The same for the text encoder.", reason=RESIDENT, changes_results=False, default=False
    )
    group_offload_vae: bool = unsupported(help="The same for the VAE.", reason=RESIDENT, changes_results=False, default=False)


class BlockSwapOptions(Options):
    """A number of blocks streamed, the rest resident."""

    title: ClassVar[str] = "Block swap"

    musubi_blocks_to_swap: int = unsupported(
        help="How many blocks are kept in host memory.", reason=RESIDENT, changes_results=False, default=0
    )
    musubi_block_swap_device: str = unsupported(help="Where those blocks are kept.", reason=RESIDENT, changes_results=False, default="cpu")


class RamTorchOptions(Options):
    """Linear layers streamed one by one."""

    title: ClassVar[str] = "RamTorch"

    ramtorch: bool = unsupported(
        help="Keep the transformer's linear layers in host memory.", reason=RESIDENT, changes_results=False, default=False
    )
    ramtorch_text_encoder: bool = unsupported(help="The same for the text encoder.", reason=RESIDENT, changes_results=False, default=False)
    ramtorch_vae: bool = unsupported(help="The same for the VAE.", reason=RESIDENT, changes_results=False, default=False)
    ramtorch_target_modules: list[str] | str | None = unsupported(
        help="Name patterns of the layers to keep there; all when empty.", reason=RESIDENT, changes_results=False
    )
    ramtorch_transformer_percent: float = unsupported(
        help="Share of the transformer's layers, in percent.", reason=RESIDENT, changes_results=False, default=100.0
    )
    ramtorch_text_encoder_percent: float = unsupported(
        help="Share of the text encoder's layers, in percent.", reason=RESIDENT, changes_results=False, default=100.0
    )


class StartupOptions(Options):
    """Where weights live before training starts."""

    title: ClassVar[str] = "Start"

    offload_during_startup: bool = unsupported(
        help="Keep models in host memory while the cache is filled.",
        reason="encoders are loaded one at a time and dropped before the transformer is loaded", changes_results=False, default=False,
    )
