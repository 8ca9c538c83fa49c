"""Loss curves of a training run as a picture.

    python -m demo.curves RUN/log.jsonl OUT.png

A panel for each stage, on a logarithmic scale: the loss of each logged step, and its median over the steps around it;
the dots are the loss on the fixed set at both ends of the stage.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo.sheet import GAP_PX, INK, MARGIN_PX, PAGE, TEXT_PX

WIDE_PX, HIGH_PX = 420, 320
AXIS_PX = 84
PALE, STRONG, DOT = (196, 208, 224), (28, 84, 156), (200, 60, 30)
DOT_PX = 6
SMOOTHED = 21
"""Logged steps of which a median is shown."""

Points = NDArray[np.float64]
"""(n, 2) step and loss"""


def main() -> None:
    log, out = Path(sys.argv[1]), Path(sys.argv[2])
    losses: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ends: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        to, name = (ends, "validation") if "validation" in entry else (losses, "loss")
        to[entry["stage"]].append((entry["step"], entry[name]))
    panels = [_panel(stage, np.array(points), np.array(ends[stage])) for stage, points in losses.items()]
    page = Image.new("RGB", (sum(one.width for one in panels), panels[0].height), PAGE)
    for number, panel in enumerate(panels):
        page.paste(panel, (number * panel.width, 0))
    page.save(out)


def _panel(stage: str, points: Points, ends: Points) -> Image.Image:
    panel = Image.new("RGB", (AXIS_PX + WIDE_PX + GAP_PX, 2 * MARGIN_PX + TEXT_PX + HIGH_PX + GAP_PX), PAGE)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(TEXT_PX)
    top = MARGIN_PX + TEXT_PX
    both = np.concatenate([points, ends.reshape(-1, 2)])
    last, low, high = both[:, 0].max(), both[:, 1].min() * 0.95, both[:, 1].max() * 1.05

    def placed(curve: Points) -> list[tuple[float, float]]:
        share = (np.log(curve[:, 1]) - np.log(low)) / (np.log(high) - np.log(low))
        return list(zip(AXIS_PX + WIDE_PX * curve[:, 0] / last, top + HIGH_PX * (1 - share), strict=True))

    draw.text((AXIS_PX, GAP_PX), f"{stage}, {last:.0f} steps", fill=INK, font=font)
    draw.rectangle((AXIS_PX, top, AXIS_PX + WIDE_PX, top + HIGH_PX), outline=INK)
    for value in np.geomspace(low, high, 4):
        ((_, y),) = placed(np.array([[0.0, value]]))
        draw.text((GAP_PX // 2, y), f"{value:.3g}", fill=INK, font=font, anchor="lm")
    half = SMOOTHED // 2
    medians = [np.median(points[max(0, n - half) : n + half + 1, 1]) for n in range(len(points))]
    draw.line(placed(points), fill=PALE, width=2)
    draw.line(placed(np.column_stack([points[:, 0], medians])), fill=STRONG, width=3)
    for x, y in placed(ends.reshape(-1, 2)):
        draw.ellipse((x - DOT_PX, y - DOT_PX, x + DOT_PX, y + DOT_PX), fill=DOT)
    return panel


if __name__ == "__main__":
    main()
