"""Weights and cards: what belongs together loads, everything else says why not."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.models.card import Card, embedded, find, for_degradation, read_card
from engine.models.checkpoint import (
    between,
    chosen,
    load,
    load_detector,
    read_weights,
    save,
    with_numbers,
)
from engine.models.cra_srgan.config import SCALES, full, lite
from engine.models.cra_srgan.generator import CraSrgan
from tests.networks import TINY, random_checkpoint

EMBEDDED = read_card(find("lite")).sizes


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


class Trap:
    """Opened as a pickle it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(checkpoint, tmp_path):
    """Not even with the name of safetensors and a card that knows it."""
    checkpoint.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    card = checkpoint.with_suffix(".json")
    fields = json.loads(card.read_text())
    fields["sha256"] = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    card.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="do not fit"):
        load(str(checkpoint))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(checkpoint.read_bytes())
    assert (tmp_path / "sprung").exists()  # it was set


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
    assert 500_000 <= count["l"] <= 2_000_000
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


def trained_from_lite(path, config, *changed):
    """Weights of `lite` but for tensors whose names begin so, as fine-tuning leaves them."""
    weights = read_weights("lite")
    rng = torch.Generator().manual_seed(3)
    for name, value in CraSrgan(config).state_dict().items():
        if name not in weights or name.startswith(changed):
            start = weights.get(name, torch.zeros_like(value)).float()
            weights[name] = start + 0.01 * torch.randn(value.shape, generator=rng)
    card = save(
        path,
        weights,
        config=config,
        name=path.stem,
        degradation="clean",
        licence="CC0",
        training={},
        numbers={},
        trained_from="lite",
    )
    return card, {name: value.half() for name, value in weights.items()}


@pytest.mark.parametrize("config", [EMBEDDED, replace(EMBEDDED, clean=True)], ids=["same sizes", "one layer more"])
def test_what_equals_the_embedded_base_is_not_stored_again(tmp_path, config):
    path = tmp_path / "lively.safetensors"
    card, weights = trained_from_lite(path, config, "local.stages.", "local.clean.")
    assert card.base == {"name": "lite", "sha256": read_card(find("lite")).sha256}
    assert all(name.startswith(("local.stages.", "local.clean.")) for name in load_file(path))
    assert card.parameters == sum(p.numel() for p in CraSrgan(config).parameters())
    state = load(str(path)).network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value.float()) for name, value in weights.items())


def test_another_base_than_it_was_trained_with_is_refused(tmp_path):
    path = tmp_path / "lively.safetensors"
    trained_from_lite(path, EMBEDDED, "local.head.")
    card = path.with_suffix(".json")
    sha256 = read_card(find("lite")).sha256
    card.write_text(card.read_text().replace(sha256, "0" * 64))
    with pytest.raises(ModelError, match=rf"'lite' 0{{12}}, embedded here is {sha256[:12]}"):
        load(str(path))


def test_the_dial_leads_from_a_model_to_its_base(tmp_path):
    path = tmp_path / "lively.safetensors"
    trained_from_lite(path, EMBEDDED, "local.")
    base, own = load("lite"), load(str(path))
    ends = {fidelity: between(load(str(path)), fidelity) for fidelity in (0.0, 0.25, 1.0)}
    assert ends[0.0].card == own.card
    assert ends[1.0].card == base.card
    name = "local.trunk.enter.weight"
    expected = 0.75 * own.network.state_dict()[name] + 0.25 * base.network.state_dict()[name]
    assert torch.allclose(ends[0.25].network.state_dict()[name], expected, atol=1e-7)
    assert ends[0.25].card.name == "lively@0.25"
    digests = {between(load(str(path)), fidelity).card.sha256 for fidelity in (0.0, 0.2, 0.25, 1.0)}
    assert len(digests) == 4  # other pixels, other plans


def test_a_dial_without_two_ends_is_refused(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="from 0 embedded models, 1 is needed"):
        chosen(str(checkpoint), "clean", 0.5)
    with pytest.raises(ModelError, match=r"1\.5 is not between"):
        chosen("lite", "clean", 1.5)
    path = tmp_path / "scan.safetensors"
    trained_from_lite(path, replace(EMBEDDED, clean=True), "local.")
    with pytest.raises(ModelError, match="nothing lies between"):
        chosen(str(path), "clean", 0.5)


@pytest.mark.skipif("gan" in embedded(), reason="a model of livelier texture is embedded")
def test_a_dial_says_what_is_not_embedded_yet():
    with pytest.raises(ModelError, match="0 are embedded so far"):
        chosen(None, "clean", 0.5)


def test_a_successor_of_an_embedded_model_holds_all(tmp_path):
    path = tmp_path / "lite.safetensors"
    card, weights = trained_from_lite(path, EMBEDDED, "local.head.")
    assert not card.base
    assert load_file(path).keys() == weights.keys()
