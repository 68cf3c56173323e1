"""Drawing: a picture is its own row's business; snapshots come back whole or not at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixart_models.autoencoder import Autoencoder, load_autoencoder
from pixart_models.config import get_preset
from pixart_models.diffusion import ObjectiveName
from pixart_models.dit import DiT
from pixart_models.drawing import (
    Drawer,
    DrawingError,
    draw_classes,
    initial_noise,
    load_drawer,
    predict,
    solve,
)
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, SnapshotError, load_network, save_snapshot
from pixart_models.text import TextEncoder, load_text_encoder, pad_features

PROMPTS = ["a red three", "a blue seven to the left of a green eight on a dark picture", ""]
SEEDS = [1, 2, 3]


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Give every parameter, the zero-initialised ones too, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter.shape[-1]
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    return load_text_encoder("builtin:t5-tiny", 48)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return load_autoencoder("builtin:digits")


def build_drawer(
    text_encoder: TextEncoder, autoencoder: Autoencoder, objective: ObjectiveName
) -> Drawer:
    network = PixArt(get_preset("digits-mini", predict_variance=objective == "iddpm"))
    randomize(network)
    config = SnapshotConfig(
        network=network.config, objective=objective, resolution=32,
        autoencoder=autoencoder.source, autoencoder_digest=autoencoder.digest,
        text_encoder=text_encoder.source, text_encoder_digest=text_encoder.digest,
    )  # fmt: skip
    return Drawer(config, network, autoencoder, text_encoder)


@pytest.fixture(scope="module", params=["flow", "iddpm"])
def drawer(
    request: pytest.FixtureRequest, text_encoder: TextEncoder, autoencoder: Autoencoder
) -> Drawer:
    return build_drawer(text_encoder, autoencoder, request.param)


@pytest.fixture(scope="module")
def flow_drawer(text_encoder: TextEncoder, autoencoder: Autoencoder) -> Drawer:
    return build_drawer(text_encoder, autoencoder, "flow")


@pytest.fixture
def snapshot(flow_drawer: Drawer, tmp_path: Path) -> Path:
    save_snapshot(tmp_path, flow_drawer.config, flow_drawer.network.state_dict())
    return tmp_path


def count_rows(network: nn.Module, draw: Callable[[], Any]) -> list[int]:
    """Rows of each network evaluation while ``draw`` runs."""
    rows: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(len(args[0]))

    handle = network.register_forward_pre_hook(note)
    draw()
    handle.remove()
    return rows


def test_the_same_seed_draws_the_same_picture_and_another_does_not(drawer: Drawer) -> None:
    one = drawer.draw(PROMPTS, SEEDS, steps=3)
    assert one.shape == (3, 32, 32, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(drawer.draw(PROMPTS, SEEDS, steps=3), one)
    other = drawer.draw(PROMPTS, [4, 5, 6], steps=3)
    assert (np.abs(one.astype(int) - other).mean(axis=(1, 2, 3)) > 2).all()


def test_a_picture_in_a_batch_is_the_picture_alone(drawer: Drawer) -> None:
    together = drawer.draw(PROMPTS, SEEDS, steps=3)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = drawer.draw([prompt], [seed], steps=3)[0]
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_prompt_negative_prompt_guidance_and_steps_each_change_the_picture(drawer: Drawer) -> None:
    base: dict[str, Any] = {"prompts": ["a red three"], "seeds": [1], "steps": 3, "guidance": 3.0}
    pictures = [
        drawer.draw(**{**base, **changed})
        for changed in (
            {},
            {"prompts": ["a blue two"]},
            {"negative_prompt": "a red three above a blue four"},
            {"guidance": 5.0},
            {"steps": 5},
        )
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_guidance_of_one_is_the_conditional_prediction_and_costs_one_row(drawer: Drawer) -> None:
    features = drawer.text_encoder.encode(PROMPTS)
    text, mask = pad_features(features)

    def conditional(x: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = drawer.network(x, timesteps, text, mask)
        return output[:, : x.shape[1]]

    with torch.inference_mode():
        x = torch.stack([initial_noise(seed, (8, 8, 8)) for seed in SEEDS])
        latents = solve(conditional, x, drawer.config.objective, 3)
    expected = drawer.autoencoder.decode(latents)
    drawn = drawer.draw(PROMPTS, SEEDS, steps=3, guidance=1.0, negative_prompt="a blue two")
    np.testing.assert_array_equal(drawn, expected)
    for guidance, rows in ((1.0, 3), (2.5, 6), (0.0, 6)):
        counted = count_rows(
            drawer.network,
            lambda g=guidance: drawer.draw(PROMPTS, SEEDS, steps=2, guidance=g),  # type: ignore[misc]
        )
        assert counted == [rows, rows]


def test_each_row_is_guided_by_its_own_scale_and_negative(drawer: Drawer) -> None:
    features = drawer.text_encoder.encode(PROMPTS)
    negatives = drawer.text_encoder.encode(["", "a longer thing that is not wanted", "x"])
    x, timesteps = (
        torch.stack([initial_noise(s, (8, 8, 8)) for s in SEEDS]),
        torch.tensor([900.0, 500.0, 1.0]),
    )
    scale = torch.tensor([2.5, 1.0, 0.0])
    with torch.inference_mode():
        mixed = predict(drawer.network, x, timesteps, features, negatives, scale)
        for i in range(3):
            row = slice(i, i + 1)
            one, other = (
                drawer.network(x[row], timesteps[row], f[i][None])[:, :8]
                for f in (features, negatives)
            )
            expected = other + scale[i] * (one - other)
            torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)
    rows = count_rows(
        drawer.network, lambda: predict(drawer.network, x, timesteps, features, negatives, scale)
    )
    assert rows == [5], "only the rows with guidance are evaluated twice"


def test_any_size_on_the_grid_can_be_drawn(flow_drawer: Drawer) -> None:
    pictures = flow_drawer.draw(["a red three"], [1], steps=1, size=(48, 24))
    assert pictures.shape == (1, 24, 48, 3)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((36, 32), "width = 36 px: must be a positive multiple of 8"),
        ((32, 33), "height = 33 px: must be a positive multiple of 8"),
        ((0, 32), "width = 0 px: must be a positive multiple of 8"),
        ((32, -8), "height = -8 px: must be a positive multiple of 8"),
    ],
)
def test_a_size_off_the_grid_names_the_side(
    flow_drawer: Drawer, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(DrawingError, match=message):
        flow_drawer.draw(["a red three"], [1], size=size)


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_a_dit_draws_classes_each_as_if_alone(
    autoencoder: Autoencoder, objective: ObjectiveName
) -> None:
    network = DiT(
        get_preset("digits-mini", architecture="dit", predict_variance=objective == "iddpm")
    )
    randomize(network)

    def draw(labels: list[int], seeds: list[int], guidance: float = 2.0) -> Any:
        return draw_classes(
            network, autoencoder, objective, labels, seeds, steps=3, guidance=guidance
        ).astype(int)

    together = draw([3, 7], [1, 1])
    assert together.shape == (2, 32, 32, 3)
    assert np.abs(together[0] - together[1]).mean() > 2
    for i, label in enumerate([3, 7]):
        assert np.abs(together[i] - draw([label], [1])[0]).max() <= 1
    np.testing.assert_array_equal(draw([3], [1], guidance=0.0), draw([7], [1], guidance=0.0))


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
        edit_config(lambda c: c["network"].update(depth=3)),
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
        edit_config(lambda c: c.update(surprise=1)),
        r"config.json is not a snapshot config: unknown keys \['surprise'\]",
    ),
    "unknown network key": (
        edit_config(lambda c: c["network"].update(surprise=1)),
        "config.json is not a snapshot config: .*surprise",
    ),
    "missing config key": (edit_config(lambda c: c.pop("resolution")), "config.json .*resolution"),
    "impossible network": (
        edit_config(lambda c: c["network"].update(heads=5)),
        "config.json is not a snapshot config: .*heads = 5",
    ),
    "unknown objective": (
        edit_config(lambda c: c.update(objective="score")),
        "config.json is not a snapshot config: unknown objective 'score'",
    ),
    "giant": (
        edit_config(lambda c: c["network"].update(depth=10**6, width=4800)),
        "asks for a network beyond",
    ),
    "other text encoder": (
        edit_config(lambda c: c.update(text_encoder_digest="0" * 16)),
        "trained with text encoder 0000000000000000, but the one at hand is",
    ),
    "other autoencoder": (
        edit_config(lambda c: c.update(autoencoder_digest="0" * 16)),
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


def test_a_class_conditional_snapshot_does_not_draw_prompts(
    flow_drawer: Drawer, tmp_path: Path
) -> None:
    network = DiT(get_preset("digits-mini", architecture="dit"))
    config = replace(flow_drawer.config, network=network.config)
    save_snapshot(tmp_path, config, network.state_dict())
    with pytest.raises(SnapshotError, match="class-conditional DiT: only PixArt draws prompts"):
        load_drawer(tmp_path, like=flow_drawer)
