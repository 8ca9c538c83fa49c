"""Weights and cards: what belongs together loads, everything else says why not."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.models.card import Card
from engine.models.checkpoint import embedded, find, for_degradation, load, load_detector, read_card, with_numbers
from engine.models.cra_srgan.config import SCALES, full, lite
from engine.models.cra_srgan.generator import CraSrgan
from tests.networks import TINY, random_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return random_checkpoint(tmp_path, TINY)


def test_what_was_saved_is_what_loads(checkpoint):
    loaded = load(str(checkpoint))
    assert loaded.card == Card.read(checkpoint.with_suffix(".json"))
    assert loaded.card.config == TINY
    stored = load_file(checkpoint)
    state = loaded.network.state_dict()
    assert set(state) == set(stored)
    assert all(torch.equal(state[name], value.float()) for name, value in stored.items())
    assert all(value.dtype == torch.float32 for value in state.values())
    assert not loaded.network.training


def test_the_card_tells_the_context_of_the_layers(checkpoint):
    card = read_card(checkpoint)
    network = CraSrgan(TINY)
    assert card.context_px == {str(scale): network.context_px(scale) for scale in SCALES}
    assert card.align_px == CraSrgan.ALIGN_PX
    assert card.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("place", [100, -1])
def test_one_changed_byte_is_refused(checkpoint, place):
    data = bytearray(checkpoint.read_bytes())
    data[place] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(ModelError, match="sha256"):
        load(str(checkpoint))


def test_a_missing_card_is_refused(checkpoint):
    checkpoint.with_suffix(".json").unlink()
    with pytest.raises(ModelError, match="no card"):
        load(str(checkpoint))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: json.dumps(json.loads(text) | {"surprise": 1}),
        lambda text: json.dumps(json.loads(text) | {"config": {"depth": 3}}),
        lambda text: json.dumps(json.loads(text) | {"config": None}),
    ],
    ids=["cut off", "a list", "empty", "unknown field", "unknown size", "no config"],
)
def test_a_bad_card_is_refused(checkpoint, damage):
    card = checkpoint.with_suffix(".json")
    card.write_text(damage(card.read_text()))
    with pytest.raises(ModelError, match="not a model card"):
        load(str(checkpoint))


def test_a_card_of_another_network_is_refused(checkpoint):
    card = checkpoint.with_suffix(".json")
    text = card.read_text()
    card.write_text(json.dumps(json.loads(text) | {"network": "unheard-of"}))
    with pytest.raises(ModelError, match="unheard-of"):
        load(str(checkpoint))
    fields = json.loads(text)
    fields["config"]["trunk_blocks"] += 1
    card.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="do not fit"):
        load(str(checkpoint))


@pytest.mark.parametrize("name", ["nobody", "nobody.safetensors", "lite.bin", ""])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(ModelError, match="lite"):
        find(name)


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError):
        load(str(path))


def test_every_embedded_model_loads_and_the_defaults_are_among_them():
    assert for_degradation("clean") in embedded()
    for name, path in embedded().items():
        checkpoint = load(name) if read_card(path).task == "joint" else None
        card, network = load_detector(name) if checkpoint is None else (checkpoint.card, checkpoint.network)
        assert card.numbers
        assert card.licence
        assert {str(s): network.context_px(s) for s in network.SCALES} == card.context_px
        assert all(bool(torch.isfinite(p).all()) for p in network.parameters())


def test_an_unknown_degradation_is_refused():
    with pytest.raises(ModelError, match="foxing"):
        for_degradation("foxing")


def test_the_full_network_builds_and_is_larger():
    count = {
        name: sum(p.numel() for p in CraSrgan(config).parameters())
        for name, config in {"l": lite(), "f": full()}.items()
    }
    assert 500_000 <= count["l"] <= 1_500_000
    assert count["f"] > 3 * count["l"]
    network = CraSrgan(full())
    side = 16 + 2 * network.local.encode_margin_px(1)
    guide = torch.rand(1, full().guide_channels + 1, side, side)
    with torch.inference_mode():
        features, picture = network.local.encode(torch.rand(1, 3, side, side), torch.zeros(1, 1, side, side), guide, 1)
        output = network.local.decode(features, picture, 1)
    assert output[-1].shape == (1, 3, 32, 32)


def test_numbers_are_replaced_and_nothing_else(checkpoint):
    before = read_card(checkpoint)
    with_numbers(checkpoint, {"psnr": 31.5})
    after = read_card(checkpoint)
    assert after.numbers == {"psnr": 31.5}
    assert (after.sha256, after.config, after.context_px) == (before.sha256, before.config, before.context_px)
    load(str(checkpoint))
    assert np.isclose(after.numbers["psnr"], 31.5)
