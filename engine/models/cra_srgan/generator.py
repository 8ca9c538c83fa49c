"""CRA-SRGAN: contextual residual aggregation and progressive super-resolution in one generator.

Two halves (see `guide` and `local`), joined by what the guide leaves for every tile. Deliberately absent: anything
that looks at a whole tile at once, batch normalisation, Fourier transforms.
"""

from engine.models.cra_srgan.config import SCALES, Config
from engine.models.cra_srgan.guide import GlobalHalf
from engine.models.cra_srgan.layers import Network, Padding
from engine.models.cra_srgan.local import LocalHalf


class CraSrgan(Network):
    """The generator. `padding="valid"` restores, `padding="same"` trains; the parameters are the same."""

    NAME, TASK, SCALES = "cra-srgan", "joint", SCALES
    ALIGN_PX = 8
    """A tile's origin, halo included, lies on this grid: windows of the fusion attention."""

    def __init__(self, config: Config, *, padding: Padding = "valid") -> None:
        super().__init__()
        self.config = config
        self.guide = GlobalHalf(config)
        self.local = LocalHalf(config, padding=padding)

    def context_px(self, scale: int) -> int:
        """Input pixels around a tile that its output at `scale` depends on; a sum over the layers."""
        return self.local.context_px(scale.bit_length() - 1)
