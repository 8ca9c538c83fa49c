"""Keys: only their hashes are stored, and nothing but the right one opens anything."""

import pytest

from engine.errors import PlanError, Unauthorized
from engine.serve.keys import ANYBODY, Keys, add_key


def test_a_key_opens_its_owner_alone(tmp_path):
    path = tmp_path / "keys"
    first, second = add_key(path, "reading-room"), add_key(path, "lab", max_bytes=5)
    assert first not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys = Keys.read(path)
    assert keys.owner(f"Bearer {first}").name == "reading-room"
    assert (keys.owner(f"bearer  {second} ").name, keys.owner(f"Bearer {second}").max_bytes) == ("lab", 5)
    for wrong in (None, "", "Bearer", "Bearer ", f"Bearer {first}x", first, f"Basic {first}", f"Bearer {first[:-1]}"):
        with pytest.raises(Unauthorized):
            keys.owner(wrong)


def test_without_keys_everybody_is_one():
    assert Keys().owner(None) == Keys().owner("Bearer whatever") == ANYBODY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 keys"),
        ("# only words\n\n", "has 0 keys"),
        ("lab 123\n", "line 1"),
        (f"lab {'a' * 64}\nlab {'b' * 64}\n", "line 2"),
        (f"lab {'a' * 64} -5\n", "line 1"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Keys.read(path)


def test_a_key_is_added_to_a_file_that_was_edited_by_hand(tmp_path):
    first = add_key(tmp_path / "keys", "lab")
    path = tmp_path / "keys"
    path.write_text(path.read_text().rstrip("\n"))
    second = add_key(path, "museum")
    keys = Keys.read(path)
    assert [keys.owner(f"Bearer {key}").name for key in (first, second)] == ["lab", "museum"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        Keys.read(tmp_path / "keys")


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "x" * 65, "lab"])
def test_names_that_are_none_or_taken(tmp_path, name):
    add_key(tmp_path / "keys", "lab")
    before = (tmp_path / "keys").read_text()
    with pytest.raises(PlanError, match="choose another"):
        add_key(tmp_path / "keys", name)
    assert (tmp_path / "keys").read_text() == before
