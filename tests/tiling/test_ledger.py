"""Records are created once and never trusted when torn."""

import pytest

from engine.tiling.grid import ShardKey
from engine.tiling.ledger import Ledger, Record

RECORD = Record(ShardKey(0, 3, 5), "a" * 64, 1234)


def test_a_record_is_found_again(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.get(RECORD.key) is None
    assert ledger.add(RECORD)
    assert Ledger(tmp_path).get(RECORD.key) == RECORD


def test_the_first_record_stays(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(RECORD)
    assert not ledger.add(Record(RECORD.key, "b" * 64, 99))
    assert ledger.get(RECORD.key) == RECORD


def test_a_struck_record_is_gone_and_may_come_back(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.strike(RECORD.key)
    ledger.add(RECORD)
    ledger.strike(RECORD.key)
    assert ledger.get(RECORD.key) is None
    assert ledger.add(RECORD)


def test_records_come_in_order_of_place(tmp_path):
    keys = [ShardKey(1, 0, 0), ShardKey(0, 10, 0), ShardKey(0, 2, 0), ShardKey(0, 0, 11), ShardKey(0, 0, 3)]
    ledger = Ledger(tmp_path)
    for key in keys:
        ledger.add(Record(key, "c" * 64, 1))
    assert [record.key for record in ledger.records()] == sorted(keys)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"key": "0/3.5", "sha2',
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"key": "0/3.5", "sha256": "aa", "num_bytes": 1}',
        b'{"key": "0/3.5", "sha256": "%s", "num_bytes": "1"}' % (b"a" * 64),
        b'{"key": "0/3.5", "sha256": "%s", "num_bytes": 0}' % (b"a" * 64),
        b'{"key": "0/3.6", "sha256": "%s", "num_bytes": 1}' % (b"a" * 64),
        b'{"key": "0/3.5", "sha256": null, "num_bytes": 1}',
    ],
)
def test_a_torn_record_counts_as_none_and_makes_room(tmp_path, text):
    path = tmp_path / "0" / "3.5.json"
    path.parent.mkdir()
    path.write_bytes(text)
    (tmp_path / "0" / "notes.json").write_bytes(b"not of ours")
    ledger = Ledger(tmp_path)
    assert list(ledger.records()) == []
    assert not path.exists()
    assert ledger.add(RECORD)
    assert ledger.get(RECORD.key) == RECORD
