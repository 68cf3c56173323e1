"""Snapshots come back whole or not at all, and a bad one is refused by name."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_models_drawing import PROMPTS, SEEDS, build_drawer
from torch import Tensor

from pixart_models.config import PRESETS, get_preset
from pixart_models.dit import DiT
from pixart_models.drawing import Drawer, load_drawer
from pixart_models.snapshot import (
    SnapshotConfig,
    SnapshotError,
    build_network,
    load_config,
    load_network,
    save_snapshot,
)


@pytest.fixture(scope="module")
def flow_drawer() -> Drawer:
    return build_drawer("flow")


@pytest.fixture
def snapshot(flow_drawer: Drawer, tmp_path: Path) -> Path:
    save_snapshot(tmp_path, flow_drawer.config, flow_drawer.network.state_dict())
    return tmp_path


def test_a_snapshot_comes_back_bit_for_bit(flow_drawer: Drawer, snapshot: Path) -> None:
    config, network = load_network(snapshot)
    assert config == flow_drawer.config
    ours, theirs = network.state_dict(), flow_drawer.network.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    loaded = load_drawer(snapshot)
    assert not loaded.network.training
    np.testing.assert_array_equal(
        loaded.draw(PROMPTS, SEEDS, steps=2), flow_drawer.draw(PROMPTS, SEEDS, steps=2)
    )


def test_half_precision_weights_are_drawn_with_in_fp32(flow_drawer: Drawer, snapshot: Path) -> None:
    weights = {n: t.bfloat16() for n, t in flow_drawer.network.state_dict().items()}
    save_snapshot(snapshot, flow_drawer.config, weights)
    loaded = load_drawer(snapshot, like=flow_drawer)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert loaded.draw(["a red three"], [1], steps=1).shape == (1, 32, 32, 3)


def test_a_second_version_shares_the_encoders(flow_drawer: Drawer, snapshot: Path) -> None:
    loaded = load_drawer(snapshot, like=flow_drawer)
    assert loaded.autoencoder is flow_drawer.autoencoder
    assert loaded.text_encoder is flow_drawer.text_encoder
    assert loaded.network is not flow_drawer.network


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        (folder / "model.safetensors").unlink()  # it is mapped into memory
        save_file(weights, folder / "model.safetensors")

    return edit


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return edit


def poison(weights: dict[str, Tensor], value: float) -> None:
    weights["blocks.1.mlp.fc1.weight"][3, 2] = value


def write_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def put(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda c: c.update(changes))


def put_network(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda c: c["network"].update(changes))


BAD_SNAPSHOTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing key": (
        edit_weights(lambda w: w.pop("t_block.1.bias")),
        r"model.safetensors does not fit its config: missing or mis-shaped \['t_block.1.bias'\]",
    ),
    "extra key": (
        edit_weights(lambda w: w.update(surplus=torch.zeros(1))),
        r"model.safetensors does not fit its config: .* extra \['surplus'\]",
    ),
    "wrong shape": (
        edit_weights(lambda w: w.update({"t_block.1.bias": torch.zeros(7)})),
        r"missing or mis-shaped \['t_block.1.bias'\]",
    ),
    "another depth": (
        put_network(depth=3),
        r"mis-shaped \['blocks.2",
    ),
    "NaN": (
        edit_weights(lambda w: poison(w, float("nan"))),
        r"model.safetensors has non-finite values in \['blocks.1.mlp.fc1.weight'\]",
    ),
    "infinity": (edit_weights(lambda w: poison(w, float("inf"))), "non-finite values in"),
    "not safetensors": (write_pickle, "model.safetensors cannot be read"),
    "cut short": (truncate, "model.safetensors cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors cannot be"),
    "corrupt JSON": (
        lambda f: (f / "config.json").write_text('{"network": {"depth"'),
        "config.json is not a snapshot config",
    ),
    "not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "holds no readable config.json",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no readable config.json"),
    "JSON list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a snap"),
    "unknown key": (
        put(surprise=1),
        r"config.json is not a snapshot config: unknown keys \['surprise'\]",
    ),
    "unknown network key": (
        put_network(surprise=1),
        "config.json is not a snapshot config: .*surprise",
    ),
    "missing config key": (edit_config(lambda c: c.pop("resolution")), "config.json .*resolution"),
    "impossible network": (
        put_network(heads=5),
        "config.json is not a snapshot config: .*heads = 5",
    ),
    "unknown objective": (
        put(objective="score"),
        "config.json is not a snapshot config: objective = 'score': must be one of flow, iddpm",
    ),
    "unknown solver": (
        put(solver="magic"),
        "config.json .*: solver = 'magic': must be one of dpm",
    ),
    "solver of another objective": (put(solver="ddim"), "config.json .*: solver = 'ddim': must be"),
    "nested deeply": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json is not a snapshot config",
    ),
    "text for a number": (
        put_network(depth="2"),
        r"config.json .*: network.depth = '2': must be of type int",
    ),
    "number for a text": (put(autoencoder=3), "config.json .*: autoencoder = 3: must be of type"),
    "list for a text": (put(text_encoder=["a"]), "config.json .*: text_encoder = .* of type str"),
    "fraction for a count": (put_network(width=48.0), "network.width = 48.0: must be of type int"),
    "truth for a count": (put_network(patch=True), "network.patch = True: must be of type int"),
    "number for a truth": (put_network(size_condition=1), "size_condition = 1: must be of type"),
    "nothing for a count": (put(resolution=None), "resolution = None: must be of type int"),
    "text for a fraction": (put_network(mlp_ratio="4"), "mlp_ratio = '4': must be a finite number"),
    "NaN for a fraction": (
        put_network(position_scale=float("nan")),
        "network.position_scale = nan: must be a finite number",
    ),
    "unknown architecture": (
        put_network(architecture="unet"),
        "network.architecture = 'unet': must be one of pixart, dit",
    ),
    "list for an architecture": (put_network(architecture=["dit"]), "must be one of pixart, dit"),
    "network is no table": (put(network=[1]), "config.json is not a snapshot config"),
    "giant": (
        put_network(depth=1000, width=4800),
        "asks for a network beyond",
    ),
    "other text encoder": (
        put(text_encoder_digest="0" * 16),
        "trained with text encoder 0000000000000000, but the one at hand is",
    ),
    "other autoencoder": (
        put(autoencoder_digest="0" * 16),
        "trained with autoencoder 0000000000000000, but the one at hand is",
    ),
}


@pytest.mark.parametrize(("spoil", "place"), BAD_SNAPSHOTS.values(), ids=BAD_SNAPSHOTS.keys())
def test_a_bad_snapshot_is_refused_naming_the_place(
    flow_drawer: Drawer, snapshot: Path, spoil: Callable[[Path], Any], place: str
) -> None:
    spoil(snapshot)
    with pytest.raises(SnapshotError, match=place) as caught:
        load_drawer(snapshot, like=flow_drawer)
    assert str(snapshot) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "depth", "width", "heads", "patch", "mlp_ratio", "latent_channels", "sample_size",
        "position_scale", "text_width", "max_tokens", "num_classes",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, 10**7, 10**400])
def test_a_number_that_reaches_an_allocation_is_bounded(
    flow_drawer: Drawer, name: str, value: int
) -> None:
    document = json.loads(json.dumps(asdict(flow_drawer.config)))
    document["network"][name] = value
    with pytest.raises(SnapshotError, match=rf"^x is .*network.{name} = .*: must be above 0 and"):
        SnapshotConfig.from_json(json.dumps(document), "x")


@pytest.mark.parametrize("value", [0, 10**9])
def test_the_native_resolution_is_bounded(flow_drawer: Drawer, value: int) -> None:
    document = asdict(flow_drawer.config) | {"resolution": value}
    with pytest.raises(SnapshotError, match=f"resolution = {value}: must be above 0 and at most"):
        SnapshotConfig.from_json(json.dumps(document), "x")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@given(data=st.data(), value=_JSON)
def test_whatever_a_field_holds_is_a_config_or_a_named_error(
    flow_drawer: Drawer, data: st.DataObject, value: Any
) -> None:
    document = asdict(flow_drawer.config)
    place = document["network"] if data.draw(st.booleans()) else document
    place[data.draw(st.sampled_from(sorted(place)))] = value
    with suppress(SnapshotError):  # and no other
        config = SnapshotConfig.from_json(json.dumps(document), "x")
        with torch.device("meta"):
            build_network(config.network)


def test_a_config_from_before_solvers_were_named_still_loads(
    flow_drawer: Drawer, snapshot: Path
) -> None:
    edit_config(lambda c: c.pop("solver"))(snapshot)
    assert load_config(snapshot) == flow_drawer.config
    put(solver="lcm")(snapshot)
    assert load_config(snapshot).solver == "lcm"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_the_bounds(flow_drawer: Drawer, preset: str) -> None:
    config = replace(flow_drawer.config, network=get_preset(preset), solver="euler")
    assert SnapshotConfig.from_json(json.dumps(asdict(config)), "x") == config


def test_a_class_conditional_snapshot_does_not_draw_prompts(
    flow_drawer: Drawer, tmp_path: Path
) -> None:
    network = DiT(get_preset("digits-mini", architecture="dit"))
    config = replace(flow_drawer.config, network=network.config)
    save_snapshot(tmp_path, config, network.state_dict())
    with pytest.raises(SnapshotError, match="class-conditional DiT: only PixArt draws prompts"):
        load_drawer(tmp_path, like=flow_drawer)


def test_loaded_weights_outlive_their_file(snapshot: Path) -> None:
    """A live replica must not draw from a file that somebody rewrites in place."""
    _, network = load_network(snapshot)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    path = snapshot / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 4))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_complex_weights_are_refused(snapshot: Path) -> None:
    path = snapshot / "model.safetensors"
    weights = load_file(path)
    weights["t_block.1.bias"] = weights["t_block.1.bias"].to(torch.complex64)
    save_file(weights, path)
    with pytest.raises(SnapshotError, match=r"missing or mis-shaped \['t_block.1.bias'\]"):
        load_network(snapshot)
