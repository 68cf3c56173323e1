"""Text encoders: features at their true length, the same in any batch, from weights that stay."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_models.text import (
    BUILTIN,
    TINY_WIDTH,
    ModelNotFound,
    TextEncoder,
    is_local,
    load_text_encoder,
    pad_features,
)

PROMPTS = [
    "a red three",
    "a red three to the left of a blue seven on a dark picture",
    "",
    "caf\u00e9 \U0001f36a in Z\u00fcrich",
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder(BUILTIN, max_tokens=24)


def test_features_have_the_prompts_true_length(encoder: TextEncoder) -> None:
    features = encoder.encode(PROMPTS)
    assert [len(f) for f in features] == [encoder.count_tokens(p) for p in PROMPTS]
    assert len({len(f) for f in features}) == 4, "the batch was padded"
    assert len(features[2]) == 1, "an empty prompt is its end mark"
    assert all(f.shape[1] == encoder.width == TINY_WIDTH for f in features)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(prompts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_a_padded_batch_equals_prompts_alone(encoder: TextEncoder, prompts: list[str]) -> None:
    together = encoder.encode(prompts)
    for prompt, features in zip(prompts, together, strict=True):
        torch.testing.assert_close(features, encoder.encode([prompt])[0], rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_cut_and_keeps_its_end_mark(encoder: TextEncoder) -> None:
    prompt = "red " * 100
    assert encoder.count_tokens(prompt) > 24
    assert len(encoder.encode([prompt])[0]) == 24
    cut = encoder.tokenizer(prompt, truncation=True, max_length=24)["input_ids"]
    assert cut[-1] == encoder.tokenizer.eos_token_id


def test_word_order_changes_the_features_of_the_same_words(encoder: TextEncoder) -> None:
    """The demo's captions differ by order alone; a bag of words could not draw them."""
    one, other = encoder.encode(["a red three above a blue two", "a blue two above a red three"])
    assert len(one) == len(other)
    assert (one.mean(0) - other.mean(0)).abs().max() > 0.1 * one.std()


def test_case_does_not_matter_to_the_tiny_encoder(encoder: TextEncoder) -> None:
    one, other = encoder.encode(["A Red THREE", "a red three"])
    torch.testing.assert_close(one, other)


def test_the_tiny_encoder_is_the_same_every_time_and_leaves_the_global_seed_alone(
    encoder: TextEncoder,
) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = load_text_encoder(BUILTIN, max_tokens=24)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.digest == encoder.digest
    assert len(again.digest) == 16
    for ours, theirs in zip(encoder.encode(PROMPTS), again.encode(PROMPTS), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_of_the_same_weights_is_the_same_encoder(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_text_encoder(str(tmp_path), max_tokens=24)
    assert loaded.digest == encoder.digest
    for ours, theirs in zip(loaded.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_changed_weight_changes_the_digest(encoder: TextEncoder, tmp_path: Path) -> None:
    changed = load_text_encoder(BUILTIN, max_tokens=24)
    changed.model.shared.weight[7, 3] += 1e-3
    changed.model.save_pretrained(tmp_path)
    changed.tokenizer.save_pretrained(tmp_path)
    assert load_text_encoder(str(tmp_path), max_tokens=24).digest != encoder.digest


def test_an_unknown_folder_says_how_to_get_the_model(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ModelNotFound) as caught:
        load_text_encoder(missing, max_tokens=24)
    message = str(caught.value)
    assert f"cannot load the text encoder '{missing}'" in message
    assert "give a local folder, or a hub id" in message
    assert "\n" not in message


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="text encoder"):
        load_text_encoder(str(tmp_path), max_tokens=24)


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_padding_can_be_undone_by_its_mask(lengths: list[int]) -> None:
    rows = [torch.full((length, 3), float(i + 1)) for i, length in enumerate(lengths)]
    padded, mask = pad_features(rows)
    assert padded.shape == (len(rows), max(lengths), 3)
    assert mask.sum(1).tolist() == lengths
    assert not padded[~mask].any()
    for i, row in enumerate(rows):
        assert torch.equal(padded[i][mask[i]], row)


def test_local_sources_need_no_network(tmp_path: Path) -> None:
    assert is_local(BUILTIN)
    assert is_local(str(tmp_path))
    assert not is_local("someone/some-t5")
