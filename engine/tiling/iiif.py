"""A static folder of tiles for IIIF viewers: Image API 3.0, compliance level 0 (https://iiif.io/api/image/3.0/).

The tiles are for looking at: 8 bit sRGB through the picture's own profile, on white where it is transparent, JPEG.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyvips

from engine import vips
from engine.errors import StorageError

TILE_PX = 512
MAX_PREVIEW_PX = 1024
"""No side of `full/max` is longer."""

_QUALITY = 90


def write_iiif(flat: Path, folder: Path, *, identifier: str) -> None:
    """Makes `folder` (which must not exist) with info.json and all tiles, from a flat uncompressed TIFF.

    `identifier`: the address under which the folder will be served; viewers ask there for the tiles.
    """
    folder.mkdir()
    tiles = folder / "tiles"
    try:
        with flat.open("rb") as stored:
            for_the_web(vips.load(stored, "tiff")).dzsave(
                str(tiles),
                layout="iiif3",
                tile_size=TILE_PX,
                overlap=0,
                suffix=f".jpg[Q={_QUALITY}]",
                id="http://localhost",
                keep=pyvips.ForeignKeep.NONE,
            )
        _describe(flat, tiles, identifier)
    except pyvips.Error as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise StorageError(f"{folder}: the tiles could not be written ({error}). Run the command again.") from error
    (folder / "vips-properties.xml").unlink(missing_ok=True)  # which libvips writes beside its folder
    for item in tiles.iterdir():
        item.rename(folder / item.name)
    tiles.rmdir()


def for_the_web(image: pyvips.Image) -> pyvips.Image:
    """8 bit sRGB or grey, without alpha."""
    top = 65535 if image.format == "ushort" else 255
    if image.hasalpha():
        image = image.flatten(background=[top], max_alpha=top)
    if "icc-profile-data" in image.get_fields():
        return image.icc_transform("srgb", embedded=True, depth=8, intent="relative")
    return image.colourspace("b-w" if image.bands == 1 else "srgb") if image.format == "uchar" else _halved(image)


def _halved(image: pyvips.Image) -> pyvips.Image:
    """16 to 8 bit, rounded: 65535 becomes 255."""
    return ((image + 128) / 257).cast("uchar").copy(interpretation="b-w" if image.bands == 1 else "srgb")


def _describe(flat: Path, folder: Path, identifier: str) -> None:
    """What a level 0 service must have besides its tiles: `full/max`, every size in the list, the address."""
    path = folder / "info.json"
    info: dict[str, Any] = json.loads(path.read_bytes())
    with flat.open("rb") as stored:
        image = for_the_web(vips.load(stored, "tiff"))
        preview = image.thumbnail_image(MAX_PREVIEW_PX, height=MAX_PREVIEW_PX, size="down")
        data = bytes(preview.jpegsave_buffer(Q=_QUALITY, keep=pyvips.ForeignKeep.NONE))
    # Only levels of the pyramid are listed: OpenSeadragon takes the sizes for its levels where their number fits.
    sizes = [item.name.split(",") for item in (folder / "full").iterdir() if item.name != "max"]
    target = folder / "full" / "max" / "0"
    target.mkdir(parents=True, exist_ok=True)
    (target / "default.jpg").write_bytes(data)
    info |= {
        "id": identifier,
        "sizes": [{"width": w, "height": h} for w, h in sorted((int(w), int(h)) for w, h in sizes)],
    }
    if max(info["width"], info["height"]) > MAX_PREVIEW_PX:
        info |= {"maxWidth": MAX_PREVIEW_PX, "maxHeight": MAX_PREVIEW_PX}
    path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
