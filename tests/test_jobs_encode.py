"""Encoding: exact bytes, square crops, and rows that stay aligned whatever was rejected."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs.encode import _Encode, fit_square, pack_features, unpack_features
from pixart_jobs.recipe import EncodeSettings
from pixart_jobs.scenes import compose_scene
from pixart_models.autoencoder import load_autoencoder
from pixart_models.text import load_text_encoder


@repeatable
@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_features_come_back_bit_for_bit(length: int, width: int, random: Any) -> None:
    bits = [random.randrange(2**16) for _ in range(length * width)]
    patterns = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(length, width)
    features = patterns.view(torch.bfloat16)
    packed = pack_features(features)
    assert len(packed) == 2 * length * width
    again = unpack_features(packed, width)
    assert again.shape == (length, width)
    assert torch.equal(again.view(torch.uint16), patterns), "nan and infinity included"


def test_packing_takes_any_float_and_layout() -> None:
    features = torch.arange(12, dtype=torch.float32).view(3, 4).T
    assert torch.equal(unpack_features(pack_features(features), 3).float(), features)


def test_bytes_are_little_endian_bfloat16() -> None:
    assert pack_features(torch.tensor([[1.0, -2.0]])) == bytes.fromhex("803f00c0")


def frame(height: int, width: int) -> NDArray[np.uint8]:
    """Green, with the largest centred square red."""
    side = min(height, width)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = 255
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = (255, 0, 0)
    return pixels


@pytest.mark.parametrize(
    ("height", "width"),
    [(32, 32), (64, 64), (7, 7), (33, 32), (100, 31), (31, 100), (1, 1), (12, 200), (500, 16)],
)
def test_a_picture_is_scaled_to_cover_and_cropped_to_its_middle(height: int, width: int) -> None:
    pixels = fit_square(frame(height, width), 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    assert -1 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert (pixels[0, 8:24, 8:24] == 1).all(), "the middle is the middle's red"
    assert (pixels[1, 8:24, 8:24] == -1).all()


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    pixels = ((fit_square(picture, 32).permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    np.testing.assert_array_equal(pixels.numpy(), picture)


def test_cropping_takes_both_ends_alike() -> None:
    ramp = np.broadcast_to(np.arange(0, 120, dtype=np.uint8)[None, :, None], (40, 120, 3))
    pixels = fit_square(np.ascontiguousarray(ramp), 40)
    shown = ((pixels[0, 0] + 1) * 127.5).round()
    assert (int(shown[0]), int(shown[-1])) == (40, 79)


SETTINGS = EncodeSettings(resolutions=(32, 40), batch_images=2)
REJECTED, UNCAPTIONED = 1, 4


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Five scenes of which one picture is rejected, and another's caption."""
    scenes = [compose_scene(i, seed=9) for i in range(5)]
    items = [
        {"id": f"{i}", "status": "ok", "bytes": scene.png(), "caption": "a red " + "three " * i,
         "caption_status": "ok"}
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    broken = {"status": "rejected: broken", "caption_status": "rejected: broken"}
    items[REJECTED] |= broken | {"bytes": b"", "caption": ""}
    items[UNCAPTIONED] |= {"caption_status": "rejected: no caption (blank)", "caption": ""}
    return pa.Table.from_pylist(items)


@pytest.fixture(scope="module")
def encoded(rows: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _Encode(SETTINGS)(rows).to_pylist()
    return found


def test_every_row_comes_back_in_its_place(rows: pa.Table, encoded: list[dict[str, Any]]) -> None:
    for column, source in (("id", "id"), ("status", "status"), ("text_status", "caption_status")):
        assert [row[column] for row in encoded] == rows[source].to_pylist()


def test_a_rejected_picture_has_an_empty_payload(encoded: list[dict[str, Any]]) -> None:
    row = encoded[REJECTED]
    assert (row["features"], row["moments_32"], row["moments_40"]) == (b"", b"", b"")
    numbers = ("num_tokens", "width", "height", "bucket_h_32", "bucket_w_32", "bucket_h_40")
    assert {row[name] for name in numbers} == {0}


def test_a_rejected_caption_keeps_its_picture(encoded: list[dict[str, Any]]) -> None:
    row = encoded[UNCAPTIONED]
    assert (row["features"], row["num_tokens"]) == (b"", 0)
    assert row["moments_32"]
    assert row["moments_40"]


def test_payloads_have_the_size_their_numbers_say(encoded: list[dict[str, Any]]) -> None:
    width = load_text_encoder(SETTINGS.text_encoder, SETTINGS.max_tokens).width
    channels = 2 * load_autoencoder(SETTINGS.autoencoder).channels
    for i, row in enumerate(encoded):
        assert len(row["features"]) == 2 * row["num_tokens"] * width
        for resolution in SETTINGS.resolutions:
            height, across = row[f"bucket_h_{resolution}"], row[f"bucket_w_{resolution}"]
            assert len(row[f"moments_{resolution}"]) == 2 * channels * height * across
            if i != REJECTED:
                assert height == across == resolution // 4
    lengths = [encoded[i]["num_tokens"] for i in (0, 2, 3)]
    assert lengths == sorted(set(lengths)), "features are trimmed to the caption's own length"


def test_a_row_is_encoded_the_same_alone_as_among_others(
    rows: pa.Table, encoded: list[dict[str, Any]]
) -> None:
    (alone,) = _Encode(SETTINGS)(rows.slice(3, 1)).to_pylist()
    for name, dtype in (("moments_40", np.float16), ("moments_32", np.float16)):
        ours, theirs = (np.frombuffer(row[name], dtype) for row in (alone, encoded[3]))
        np.testing.assert_allclose(ours, theirs, atol=0.01)
    features = [unpack_features(row["features"], 64).float() for row in (alone, encoded[3])]
    torch.testing.assert_close(features[0], features[1], atol=0.02, rtol=0.02)


def test_the_moments_decode_to_the_picture(encoded: list[dict[str, Any]]) -> None:
    autoencoder = load_autoencoder(SETTINGS.autoencoder)
    row = encoded[2]
    moments = torch.frombuffer(bytearray(row["moments_40"]), dtype=torch.float16)
    mean = moments.view(-1, row["bucket_h_40"], row["bucket_w_40"])[: autoencoder.channels].float()
    decoded = autoencoder.decode(mean[None] * autoencoder.scale)[0]
    scene = Image.open(io.BytesIO(compose_scene(2, seed=9).png())).resize((40, 40))
    error = np.abs(decoded.astype(int) - np.asarray(scene)).mean()
    assert error < 12, "the picture of another scene differs by far more"
    other = np.asarray(Image.fromarray(compose_scene(3, seed=9).image).resize((40, 40)))
    assert np.abs(decoded.astype(int) - other).mean() > 2 * error
