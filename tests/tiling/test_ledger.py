"""Records are created once and never trusted when torn."""

import json

import pytest

from engine.tiling.grid import ShardKey
from engine.tiling.ledger import Ledger, Record, plan_id_recorded
from engine.tiling.seal import seal, unseal

PLAN_ID = "d" * 64
RECORD = Record(ShardKey(0, 3, 5), "a" * 64, 1234)


def test_a_record_is_found_again(tmp_path):
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    assert ledger.get(RECORD.key) is None
    assert ledger.add(RECORD)
    assert Ledger(tmp_path, plan_id=PLAN_ID).get(RECORD.key) == RECORD


def test_the_first_record_stays(tmp_path):
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    ledger.add(RECORD)
    assert not ledger.add(Record(RECORD.key, "b" * 64, 99))
    assert ledger.get(RECORD.key) == RECORD


def test_a_struck_record_is_gone_and_may_come_back(tmp_path):
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    ledger.strike(RECORD.key)
    ledger.add(RECORD)
    ledger.strike(RECORD.key)
    assert ledger.get(RECORD.key) is None
    assert ledger.add(RECORD)


def test_records_come_in_order_of_place(tmp_path):
    keys = [ShardKey(1, 0, 0), ShardKey(0, 10, 0), ShardKey(0, 2, 0), ShardKey(0, 0, 11), ShardKey(0, 0, 3)]
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    for key in keys:
        ledger.add(Record(key, "c" * 64, 1))
    assert [record.key for record in ledger.records()] == sorted(keys)


FIELDS = {"key": "0/3.5", "plan_id": PLAN_ID, "sha256": "a" * 64, "num_bytes": 1}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"key": "0/3.5", "sha2',
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(FIELDS).encode(),  # without a seal
        seal(FIELDS)[:-1],
        seal(FIELDS) + b"\n",
        seal(FIELDS | {"sha256": "aa"}),
        seal(FIELDS | {"sha256": None}),
        seal(FIELDS | {"num_bytes": "1"}),
        seal(FIELDS | {"num_bytes": 0}),
        seal(FIELDS | {"key": "0/3.6"}),
        seal(FIELDS | {"plan_id": "e" * 64}),
    ],
)
def test_a_torn_record_counts_as_none_and_makes_room(tmp_path, text):
    path = tmp_path / "0" / "3.5.json"
    path.parent.mkdir()
    path.write_bytes(text)
    (tmp_path / "0" / "notes.json").write_bytes(b"not of ours")
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    assert list(ledger.records()) == []
    assert not path.exists()
    assert ledger.add(RECORD)
    assert ledger.get(RECORD.key) == RECORD


def test_what_is_not_torn_counts(tmp_path):
    """Or the test above would pass for a ledger that refuses everything."""
    path = tmp_path / "0" / "3.5.json"
    path.parent.mkdir()
    path.write_bytes(seal(FIELDS))
    assert Ledger(tmp_path, plan_id=PLAN_ID).get(RECORD.key) == Record(RECORD.key, "a" * 64, 1)


def test_any_flipped_bit_of_a_record_is_found(tmp_path):
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    ledger.add(RECORD)
    intact = ledger.path(RECORD.key).read_bytes()
    assert unseal(intact) is not None
    for bit in range(8 * len(intact)):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        assert unseal(bytes(flipped)) is None


def test_looking_deletes_nothing(tmp_path):
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    ledger.add(RECORD)
    ledger.path(RECORD.key).write_bytes(b"torn")
    assert ledger.peek(RECORD.key) is None
    assert ledger.path(RECORD.key).exists()


def test_records_tell_their_plan(tmp_path):
    assert plan_id_recorded(tmp_path) is None
    ledger = Ledger(tmp_path, plan_id=PLAN_ID)
    ledger.add(Record(ShardKey(0, 0, 0), "c" * 64, 1))
    ledger.add(RECORD)
    ledger.path(ShardKey(0, 0, 0)).write_bytes(b"torn")
    assert plan_id_recorded(tmp_path) == PLAN_ID
    ledger.path(RECORD.key).write_bytes(b"torn")
    assert plan_id_recorded(tmp_path) is None
