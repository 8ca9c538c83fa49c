from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    image: str
    name: str
    mask: str | None
    error: str | None = None
