"""Text encoders: features at their true length, the same in any batch, from weights that stay."""

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pixart_models.text import (
    BUILTIN,
    T5,
    TINY_WIDTH,
    ModelNotFound,
    TextEncoder,
    explain_failure,
    find_model,
    hash_tensors,
    load_text_encoder,
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


def test_the_builtin_digest_is_the_one_in_snapshots(encoder: TextEncoder) -> None:
    """Snapshots trained earlier name it; another would make them undrawable."""
    assert encoder.digest == "59736bb7156a5610"


def write_t5(folder: Path, encoder: TextEncoder, dtype: torch.dtype = torch.float32) -> Path:
    """A T5 with its tokenizer in one folder, as save_pretrained leaves it."""
    encoder.model.to(dtype).save_pretrained(folder)
    encoder.model.to(torch.float32)
    encoder.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def t5(encoder: TextEncoder, tmp_path: Path) -> Path:
    return write_t5(tmp_path / "t5", encoder)


def fault(source: Path | str) -> str:
    """The one line said of a source that cannot be loaded."""
    with pytest.raises(ModelNotFound) as caught:
        load_text_encoder(str(source), max_tokens=24)
    message = str(caught.value)
    assert message.startswith(f"cannot load the text encoder '{source}': ")
    assert "\n" not in message
    return message


def test_a_t5_in_a_folder_gives_its_features(encoder: TextEncoder, t5: Path) -> None:
    loaded = load_text_encoder(str(t5), max_tokens=24)
    for ours, theirs in zip(loaded.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_pipelines_folder_is_the_encoder_inside_it(encoder: TextEncoder, t5: Path) -> None:
    pipeline = t5.parent / "pipeline"
    encoder.model.save_pretrained(pipeline / "text_encoder")
    encoder.tokenizer.save_pretrained(pipeline / "tokenizer")
    loaded = load_text_encoder(str(pipeline), max_tokens=24)
    assert loaded.digest == load_text_encoder(str(t5), max_tokens=24).digest
    assert torch.equal(loaded.encode(PROMPTS[:1])[0], encoder.encode(PROMPTS[:1])[0])


def test_fp16_weights_are_never_run_in_fp16(encoder: TextEncoder, tmp_path: Path) -> None:
    loaded = load_text_encoder(str(write_t5(tmp_path, encoder, torch.float16)), max_tokens=24)
    assert loaded.model.dtype == torch.float32


def test_a_digest_does_not_depend_on_the_precision_held(t5: Path) -> None:
    """A stage trained on bf16 GPUs must be drawable on a CPU, in fp32."""
    exact, rounded = (load_text_encoder(str(t5), max_tokens=24) for _ in range(2))
    rounded.model.bfloat16()
    assert exact.digest == rounded.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_tensors_of_any_precision_and_layout_can_be_hashed(dtype: torch.dtype) -> None:
    def hash_of(values: torch.Tensor, number: float = 3.0) -> str:
        module = torch.nn.Module()
        module.register_buffer("values", values)
        module.register_buffer("number", torch.tensor(number).to(dtype))
        digest = hashlib.sha256()
        hash_tensors(digest, module)
        return digest.hexdigest()

    values = torch.arange(6).view(2, 3).to(dtype)
    assert hash_of(values) == hash_of(values.T.contiguous().T)
    assert hash_of(values) != hash_of(values.T)
    assert hash_of(values) != hash_of(values, 4.0)


def test_shards_are_found_and_one_changed_byte_changes_the_digest(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    encoder.model.save_pretrained(tmp_path, max_shard_size="100KB")
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_text_encoder(str(tmp_path), max_tokens=24)
    assert len(loaded.weights) > 2
    before, shard = loaded.digest, loaded.weights[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert load_text_encoder(str(tmp_path), max_tokens=24).digest != before


def test_a_lost_shard_is_named(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path, max_shard_size="100KB")
    encoder.tokenizer.save_pretrained(tmp_path)
    lost = sorted(tmp_path.glob("model-0*"))[1]
    lost.unlink()
    assert f"1 of 6 shards, first ['{lost.name}']" in fault(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def reshape(path: Path) -> None:
    weights = load_file(path)
    weights["shared.weight"] = weights["shared.weight"][:7].clone()
    save_file(weights, path, metadata={"format": "pt"})


def drop(path: Path) -> None:
    weights = load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("config.json", Path.unlink, "holds no config.json nor text_encoder/config.json"),
        ("config.json", cut, ""),
        ("model.safetensors", Path.unlink, "holds no model.safetensors; fetch it again"),
        ("model.safetensors", cut, "weights are damaged"),
        ("model.safetensors", reshape, "1 tensors are missing or mis-shaped, first shared.weight"),
        ("model.safetensors", drop, "mis-shaped, first encoder.final_layer_norm.weight"),
        ("tokenizer.json", Path.unlink, "holds no tokenizer (tokenizer.json or spiece.model)"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    t5: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    """A tensor that is not there would be filled with random numbers."""
    if not said:
        (t5 / name).write_text("{")
        said = f"{t5 / name} is damaged"
    else:
        damage(t5 / name)
    assert said in fault(t5)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(t5: Path) -> None:
    (t5 / "model.safetensors").rename(t5 / "pytorch_model.bin")
    message = fault(t5)
    assert "holds only pytorch_model.bin, no model.safetensors" in message
    assert "T5EncoderModel.from_pretrained(FOLDER, use_safetensors=False)" in message


def test_an_encoder_of_another_family_is_refused(t5: Path) -> None:
    """A T5 would be built around it, of random weights."""
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(config | {"model_type": "clip_text_model"}))
    assert "holds a 'clip_text_model', but a 't5' is needed" in fault(t5)


@pytest.mark.skipif(bool(find_spec("sentencepiece")), reason="sentencepiece is installed")
def test_a_tokenizer_that_needs_a_package_says_which(t5: Path) -> None:
    (t5 / "tokenizer.json").rename(t5 / "spiece.model")
    assert "'pip install sentencepiece'" in fault(t5)


def test_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    assert "give a local folder or ORG/NAME" in fault(tmp_path / "nothing")


def test_a_hub_id_offline_says_how_to_fetch_it() -> None:
    assert "'hf download someone/some-t5' fetches it" in fault("someone/some-t5")


def test_a_hub_id_in_the_cache_is_loaded_offline(
    encoder: TextEncoder, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = t5.parent / "models--someone--some-t5"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    shutil.copytree(t5, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(t5.parent))
    loaded = load_text_encoder("someone/some-t5", max_tokens=24)
    assert loaded.digest == load_text_encoder(str(t5), max_tokens=24).digest
    assert loaded.weights == (snapshot / "model.safetensors",)
    assert torch.equal(loaded.encode(PROMPTS[:1])[0], encoder.encode(PROMPTS[:1])[0])


def test_a_folder_may_start_at_home(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(t5.parent))
    assert find_model(T5, "~/t5").folder == t5


def test_8_bit_weights_need_a_gpu_and_say_so(t5: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"a CUDA device \(not 'cpu'\).*text_encoder_8bit off"):
        load_text_encoder(str(t5), max_tokens=24, eight_bit=True)


def test_a_message_of_several_lines_or_none_becomes_one() -> None:
    for error, said in ((OSError("\nfirst\nsecond"), "first"), (RuntimeError(), "RuntimeError")):
        with (
            pytest.raises(ModelNotFound, match=rf"'org/t5': {said}$"),
            explain_failure(T5, "org/t5"),
        ):
            raise error


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.text(max_size=60), max_size=9),
    batch_size=st.integers(1, 4),
)
def test_batches_by_length_hold_every_prompt_once_and_change_no_feature(
    encoder: TextEncoder, prompts: list[str], batch_size: int
) -> None:
    batches = encoder.group_by_length(prompts, batch_size)
    assert sorted(place for batch in batches for place in batch) == list(range(len(prompts)))
    lengths = [encoder.count_tokens(prompts[place]) for batch in batches for place in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    for batch in batches:
        for place, features in zip(batch, encoder.encode([prompts[i] for i in batch]), strict=True):
            alone = encoder.encode([prompts[place]])[0]
            torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)
