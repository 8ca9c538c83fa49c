"""What was sent of finished pictures is kept within bounds, and only as long as its picture."""

from pathlib import Path

from engine.serve.gallery import Gallery

TILE = b"t" * 50_000


def test_an_answer_is_kept_until_its_picture_goes():
    gallery = Gallery()
    for name in ("p", "q"):
        for tag in ("1", "2"):
            gallery.keep_answer(Path(name), tag, TILE + tag.encode())
    assert gallery.answer(Path("p"), "1") == TILE + b"1"
    assert gallery.answer(Path("p"), "3") is None
    gallery.forget(Path("p"))
    assert [gallery.answer(Path("p"), tag) for tag in "12"] == [None, None]
    assert [gallery.answer(Path("q"), tag) for tag in "12"] == [TILE + b"1", TILE + b"2"]


def test_whole_pictures_are_not_kept():
    gallery = Gallery()
    gallery.keep_answer(Path("p"), "1", bytes(2 << 20))
    assert gallery.answer(Path("p"), "1") is None


def test_neither_many_bytes_nor_many_small_answers_are_kept():
    """The oldest go; an entry takes memory even where its answer is but a pixel."""
    for data, least, most in ((TILE, 1100, 1342), (b"x", 16_000, 16_384)):
        gallery = Gallery()
        for n in range(20_000):
            gallery.keep_answer(Path("p"), str(n), data)
        kept = [n for n in range(20_000) if gallery.answer(Path("p"), str(n)) is not None]
        assert least <= len(kept) <= most
        assert kept == list(range(20_000 - len(kept), 20_000))
