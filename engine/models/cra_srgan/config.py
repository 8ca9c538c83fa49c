"""Sizes of the generator, as data."""

from dataclasses import dataclass, replace

SCALES = (1, 2, 4, 8, 16)
"""Of the progressive branch, and 1, which fills holes alone."""


@dataclass(frozen=True, slots=True)
class Config:
    """Widths, depths and modules of CRA-SRGAN. A module set to False is replaced by an identity (ablations)."""

    guide_channels: int = 15
    """Feature channels the guide leaves for the tiles; the log ratio native / guide is appended to them."""
    coarse_channels: tuple[int, int, int] = (16, 48, 64)
    """Widths of the coarse network at a half, a quarter and an eighth of the guide's size."""
    refine_channels: tuple[int, int, int] = (16, 24, 32)
    head_cell_px: int = 2
    """Side of the blocks of pixels that the scale-1 head works on, 1 or 2."""
    head_channels: int = 48
    head_dilations: tuple[int, ...] = (1, 2, 4, 2, 1)
    """Of the head's residual blocks."""
    trunk_channels: int = 48
    trunk_blocks: int = 8
    heads: int = 4
    stage_channels: tuple[int, ...] = (48, 32, 24, 16)
    """Channels of the x2 stages, from the input's resolution upwards."""
    stage_blocks: tuple[int, ...] = (2, 2, 1, 1)
    multi_scale: bool = True
    fusion: bool = True
    edge: bool = True
    frequency: bool = True
    clean: bool = False
    """Whether the picture itself is corrected before it is enlarged: noise and blocks of a bad copy."""


def lite() -> Config:
    """Small enough for a CPU."""
    return Config()


def lite_scan() -> Config:
    """`lite` for bad copies."""
    return replace(lite(), clean=True)


def realtime() -> Config:
    """`lite` with a local half of a third of the work; guide and head are as large, so that they can be taken over."""
    return replace(
        lite(), trunk_channels=32, trunk_blocks=4, stage_channels=(32, 24, 16, 16), stage_blocks=(1, 1, 1, 1)
    )


def full() -> Config:
    """The sizes of the technical report (2.2): 16 trunk blocks of 64 channels, 4 blocks in each of 4 stages."""
    return Config(
        guide_channels=31,
        coarse_channels=(48, 96, 128),
        refine_channels=(48, 96, 128),
        head_channels=64,
        head_dilations=(1, 2, 4, 4, 2, 1),
        trunk_channels=64,
        trunk_blocks=16,
        heads=8,
        stage_channels=(64, 64, 48, 32),
        stage_blocks=(4, 4, 4, 4),
    )
