"""Integer pixel arithmetic: sizes and half-open boxes, always in (y, x) order."""

from dataclasses import dataclass


def ceil_div(value: int, divisor: int) -> int:
    """The smallest integer not below value / divisor."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return ceil_div(value, multiple) * multiple


def round_down(value: int, multiple: int) -> int:
    """The largest multiple of `multiple` that is not above `value` (also below zero)."""
    return value // multiple * multiple


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Height and width in pixels."""

    h: int
    w: int

    @property
    def num_pixels(self) -> int:
        return self.h * self.w

    @property
    def long_side(self) -> int:
        return max(self.h, self.w)

    def scaled(self, factor: int) -> "Size":
        return Size(self.h * factor, self.w * factor)

    def divided(self, divisor: int) -> "Size":
        """Both sides divided, rounded up."""
        return Size(ceil_div(self.h, divisor), ceil_div(self.w, divisor))

    def __str__(self) -> str:
        return f"{self.w}x{self.h}"


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The pixels y0 <= y < y1, x0 <= x < x1; may reach outside a picture."""

    y0: int
    x0: int
    y1: int
    x1: int

    @classmethod
    def of(cls, size: Size) -> "Box":
        """The box that covers a whole picture."""
        return cls(0, 0, size.h, size.w)

    @property
    def size(self) -> Size:
        return Size(self.y1 - self.y0, self.x1 - self.x0)

    @property
    def empty(self) -> bool:
        return self.y1 <= self.y0 or self.x1 <= self.x0

    def scaled(self, factor: int) -> "Box":
        return Box(self.y0 * factor, self.x0 * factor, self.y1 * factor, self.x1 * factor)

    def shifted(self, dy: int, dx: int) -> "Box":
        return Box(self.y0 + dy, self.x0 + dx, self.y1 + dy, self.x1 + dx)

    def grown(self, margin_px: int) -> "Box":
        return Box(self.y0 - margin_px, self.x0 - margin_px, self.y1 + margin_px, self.x1 + margin_px)

    def aligned(self, align_px: int) -> "Box":
        """The smallest box around this one whose four sides are multiples of `align_px`."""
        return Box(
            round_down(self.y0, align_px),
            round_down(self.x0, align_px),
            round_up(self.y1, align_px),
            round_up(self.x1, align_px),
        )

    def halves(self) -> "tuple[Box, Box]":
        """The box cut across its longer side."""
        if self.size.h >= self.size.w:
            middle = (self.y0 + self.y1) // 2
            return Box(self.y0, self.x0, middle, self.x1), Box(middle, self.x0, self.y1, self.x1)
        middle = (self.x0 + self.x1) // 2
        return Box(self.y0, self.x0, self.y1, middle), Box(self.y0, middle, self.y1, self.x1)

    def intersection(self, other: "Box") -> "Box":
        return Box(max(self.y0, other.y0), max(self.x0, other.x0), min(self.y1, other.y1), min(self.x1, other.x1))

    def contains(self, other: "Box") -> bool:
        return self.intersection(other) == other

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of an array whose first two axes are (y, x)."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)
