"""Conversion: every weight arrives bit for bit or the reason is named, and no file is trusted."""

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixart_models.config import NetworkConfig
from pixart_models.convert import ConversionError, from_diffusers, from_published, read_weights
from pixart_models.dit import DiT
from pixart_models.export import save_diffusers, save_published
from pixart_models.pixart import PixArt
from pixart_models.snapshot import build_network

# Raw pickles, and damaged ones, claim another protocol than torch.save's.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")

TINY = NetworkConfig(depth=2, width=24, heads=2, sample_size=8, text_width=10)
SIZED = replace(TINY, sample_size=16, position_scale=2.0, size_condition=True)
PLAIN = replace(TINY, latent_channels=8, predict_variance=False, position_scale=1.25)
DIT = replace(TINY, architecture="dit", num_classes=5)
PLAIN_DIT = replace(DIT, predict_variance=False)
CONFIGS = {"pixart": TINY, "sized": SIZED, "plain": PLAIN, "dit": DIT, "plain dit": PLAIN_DIT}
PICKLES = {"zip": {}, "before torch 1.6": {"_use_new_zipfile_serialization": False}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@st.composite
def configs(draw: st.DrawFn) -> NetworkConfig:
    heads, patch, depth = (draw(st.sampled_from(values)) for values in ((1, 2, 3), (1, 2), (1, 11)))
    architecture: Literal["pixart", "dit"] = draw(st.sampled_from(("pixart", "dit")))
    return NetworkConfig(
        architecture=architecture, depth=depth, width=12 * heads, heads=heads,
        patch=patch, latent_channels=draw(st.integers(1, 5)), predict_variance=draw(st.booleans()),
        sample_size=patch * draw(st.integers(1, 5)), num_classes=draw(st.integers(1, 3)),
        position_scale=draw(st.sampled_from((0.5, 1.0, 2.0))) if architecture == "pixart" else 1.0,
        text_width=draw(st.integers(1, 5)), size_condition=draw(st.booleans()),
    )  # fmt: skip


def build(config: NetworkConfig, seed: int = 0) -> PixArt | DiT:
    """A network whose every parameter, the zero-initialised ones too, has a value of its own."""
    network = build_network(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = max(parameter.shape[-1], 4)
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return network


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    """Bit for bit, name for name, in fp32."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert list(ours) == list(theirs)
    assert {t.dtype for t in ours.values()} == {torch.float32}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def predict(network: PixArt | DiT, seed: int = 3) -> Tensor:
    """What a network makes of two fixed rows."""
    latents, timesteps, condition, sizes = draw_inputs(network.config, seed)
    told = {} if isinstance(network, DiT) else {"sizes": sizes}
    output: Tensor = network(latents, timesteps, condition, **told)
    return output


def draw_inputs(config: NetworkConfig, seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = config.sample_size
    latents = torch.randn(2, config.latent_channels, side, side, generator=generator)
    text = torch.randn(2, 4, config.text_width, generator=generator)
    condition = torch.tensor([1, 5]) if config.architecture == "dit" else text
    sizes = torch.tensor([[64.0, 32.0, 2.0], [40.0, 80.0, 0.5]])
    return latents, torch.tensor([10.0, 700.0]), condition, sizes


def predict_with_diffusers(model: Any, config: NetworkConfig) -> Tensor:
    """The same rows; a DiT's frequencies are set to those of the published weights."""
    latents, timesteps, condition, sizes = draw_inputs(config)
    if config.architecture == "dit":
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        output: Tensor = model(latents, timesteps, condition).sample
    else:
        added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        output = model(latents, condition, timesteps, added_cond_kwargs=added).sample
    return output


def diffusers_class(config: NetworkConfig) -> Any:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return DiTTransformer2DModel if config.architecture == "dit" else PixArtTransformer2DModel


def load_with_diffusers(folder: Path, config: NetworkConfig) -> Any:
    """As a user would, and nothing missing or left over."""
    model, report = diffusers_class(config).from_pretrained(
        folder, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval().requires_grad_(False)


def publish(network: PixArt | DiT, path: Path) -> dict[str, Tensor]:
    """A released state dict, with the null caption that PixArt's carry; ``path`` is without."""
    save_published(network, path)
    held = torch.load(path, weights_only=True)
    if isinstance(network, DiT):
        return dict(held)
    null = torch.randn(120, network.config.text_width)
    return {**held["state_dict"], "y_embedder.y_embedding": null}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 9))
def test_every_network_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, config: NetworkConfig, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("network")
    network = build(config, seed)
    save_diffusers(network, folder)
    assert_same(from_diffusers(folder), network)
    weights = publish(network, folder / "published.pth")
    assert_same(from_published(folder / "published.pth", config), network)
    save_file(weights, folder / "published.safetensors")
    assert_same(from_published(folder / "published.safetensors", config), network)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_diffusers_loads_our_folder_and_predicts_the_same(
    config: NetworkConfig, tmp_path: Path
) -> None:
    network = build(config)
    save_diffusers(network, tmp_path)
    theirs = predict_with_diffusers(load_with_diffusers(tmp_path, config), config)
    assert theirs.abs().mean() > 0.1
    torch.testing.assert_close(predict(network), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_folder_that_diffusers_wrote_is_read_whole_or_sharded(
    config: NetworkConfig, shard: str, tmp_path: Path
) -> None:
    network = build(config)
    save_diffusers(network, tmp_path / "ours")
    model = load_with_diffusers(tmp_path / "ours", config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / f"{WEIGHTS}.index.json").exists() == (shard == "20KB")
    read = from_diffusers(tmp_path / "theirs", max_tokens=config.max_tokens)
    assert_same(read, network)
    assert torch.equal(predict(read), predict(network))
    assert replace(read.config, num_classes=1, text_width=1) == replace(
        config, num_classes=1, text_width=1
    )
    assert config.architecture == "dit" or read.config.text_width == config.text_width
    assert config.architecture == "pixart" or read.config.num_classes == config.num_classes


def test_a_folder_written_again_forgets_its_shards(tmp_path: Path) -> None:
    save_diffusers(build(TINY), tmp_path)
    load_with_diffusers(tmp_path, TINY).save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same(from_diffusers(tmp_path), build(TINY))
    save_diffusers(build(TINY, seed=1), tmp_path)
    assert_same(from_diffusers(tmp_path), build(TINY, seed=1))


def test_the_folder_of_a_pipeline_will_do(tmp_path: Path) -> None:
    save_diffusers(build(TINY), tmp_path / "transformer")
    assert_same(from_diffusers(tmp_path), build(TINY))


@pytest.mark.parametrize(
    ("config", "name"),
    [(DIT, "caption_projection.y_embedding"), (TINY, "pos_embed.pos_embed"), (TINY, "y_pos")],
)
def test_only_what_its_layout_carries_may_be_left_over(
    config: NetworkConfig, name: str, tmp_path: Path
) -> None:
    weights = publish(build(config), tmp_path / "ours.pth")
    torch.save({**weights, name: torch.ones(1)}, tmp_path / "extra.pth")
    with pytest.raises(ConversionError, match=rf"extra \['{name} \[1\]'\] \(1 in all\)"):
        from_published(tmp_path / "extra.pth", config)


def test_the_number_of_text_tokens_is_the_callers(tmp_path: Path) -> None:
    save_diffusers(build(TINY), tmp_path)
    assert from_diffusers(tmp_path).config.max_tokens == 120
    assert from_diffusers(tmp_path, max_tokens=300).config.max_tokens == 300


@pytest.mark.parametrize("config", [TINY, DIT])
def test_folders_of_the_class_that_both_were_first_published_as(
    config: NetworkConfig, tmp_path: Path
) -> None:
    """With that time's keys: no interpolation scale, DiT without norm_eps, null for unused ones."""
    network = build(config)
    save_diffusers(network, tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    gone = ("interpolation_scale", "use_additional_conditions", "norm_eps")
    old = {key: value for key, value in document.items() if key not in gone}
    old |= {
        "_class_name": "Transformer2DModel", "only_cross_attention": False, "dropout": 0.0,
        "cross_attention_dim": None, "num_vector_embeds": None, "attention_bias": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    read = from_diffusers(tmp_path)
    assert read.config.position_scale == 1.0
    assert_same(read, network)


def test_diffusers_own_defaults_are_understood(tmp_path: Path) -> None:
    """At 1024 px: sizes are conditions, and positions are squeezed by 2."""
    model = diffusers_class(TINY)(
        num_attention_heads=1, attention_head_dim=12, num_layers=1, cross_attention_dim=12,
        caption_channels=3,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    config = from_diffusers(tmp_path).config
    assert (config.sample_size, config.position_scale, config.size_condition) == (128, 2.0, True)


@pytest.mark.parametrize("wrap", [None, "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("options", PICKLES.values(), ids=PICKLES.keys())
@pytest.mark.parametrize("config", [SIZED, DIT])
def test_released_checkpoints_of_every_form_are_read(
    config: NetworkConfig, options: dict[str, Any], wrap: str | None, tmp_path: Path
) -> None:
    network = build(config)
    weights: dict[str, Any] = publish(network, tmp_path / "ours.pth")
    held = {wrap: weights, "epoch": 3, "optimizer": {"state": {0: [1.0]}}} if wrap else weights
    torch.save(held, tmp_path / "released.pth", **options)
    assert_same(from_published(tmp_path / "released.pth", config), network)


def test_a_checkpoint_with_both_is_drawn_with_as_the_released_scripts_do(tmp_path: Path) -> None:
    held = {"state_dict": {"a": torch.ones(1)}, "state_dict_ema": {"a": torch.zeros(1)}}
    torch.save(held, tmp_path / "released.pth")
    assert read_weights(tmp_path / "released.pth")["a"] == 1


@pytest.mark.parametrize("config", [TINY, DIT])
def test_the_released_layout_is_ours_with_the_positions(
    config: NetworkConfig, tmp_path: Path
) -> None:
    network = build(config)
    published = publish(network, tmp_path / "ours.pth")
    extra = {"pos_embed"} | ({"y_embedder.y_embedding"} if isinstance(network, PixArt) else set())
    assert set(published) - set(network.state_dict()) == extra
    positions = network.positions(4, 4, torch.zeros(1))
    assert torch.equal(published["pos_embed"], positions)


@pytest.mark.parametrize("name", ["half.pth", "half.safetensors"])
def test_half_precision_becomes_fp32_exactly(name: str, tmp_path: Path) -> None:
    halves = {n: t.bfloat16() for n, t in build(TINY).state_dict().items()}
    save_file(halves, tmp_path / name) if name.endswith("s") else torch.save(
        halves, tmp_path / name
    )
    read = from_published(tmp_path / name, TINY).state_dict()
    assert all(torch.equal(read[n], t.float()) for n, t in halves.items())


@pytest.mark.parametrize("name", ["released.pth", "released.safetensors"])
def test_a_network_does_not_change_with_its_file(name: str, tmp_path: Path) -> None:
    """Files are mapped into memory while they are read, and then let go."""
    path, network = tmp_path / name, build(TINY)
    weights = publish(network, tmp_path / "ours.pth")
    save_file(weights, path) if name.endswith("s") else torch.save(weights, path)
    read = from_published(path, TINY)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(read, network)


Change = Callable[[dict[str, Any]], Any]
BIAS = "blocks.1.attn.proj.bias"
BAD_WEIGHTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda w: w.pop(BIAS), rf"missing \['{BIAS} \[24\]'\] \(1 in all\), extra \[\]"),
    "extra": (lambda w: w.update(surplus=torch.ones(1)), r"extra \['surplus \[1\]'\] \(1 in all\)"),
    "mis-shaped": (
        lambda w: w.update({BIAS: torch.ones(7)}),
        rf"missing \['{BIAS} \[24\]'\] \(1 in all\), extra \['{BIAS} \[7\]'\] \(1 in all\)",
    ),
    "many": (
        lambda w: [w.update({f"module.{n}": w.pop(n)}) for n in list(w)],
        r"missing \['blocks.0.attn.proj.bias.*'\] \(45 in all\), extra \['module.*\] \(45 in all\)",
    ),
    "NaN": (lambda w: w[BIAS].fill_(torch.nan), rf"no finite numbers in \['{BIAS}'\] \(1 in all"),
    "infinity": (lambda w: w[BIAS].fill_(-torch.inf), rf"no finite numbers in \['{BIAS}'\]"),
    "whole numbers": (lambda w: w.update({BIAS: w[BIAS].long()}), "no finite numbers in"),
    "sparse": (lambda w: w.update({BIAS: w[BIAS].to_sparse()}), "no finite numbers in"),
    "no data": (lambda w: w.update({BIAS: w[BIAS].to("meta")}), "no finite numbers in"),
    "a number": (lambda w: w.update({BIAS: 3}), "holds no dict of plain tensors by name"),
    "half a word": (lambda w: w.update(state_dict=[1]), "holds no dict of plain tensors by name"),
}


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_are_named(change: Change, message: str, tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(build(TINY).state_dict())
    change(weights)
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(ConversionError, match=message) as caught:
        from_published(tmp_path / "bad.pth", TINY)
    assert str(tmp_path / "bad.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other", [replace(TINY, depth=3), replace(TINY, predict_variance=False), SIZED, DIT]
)
def test_weights_of_another_preset_do_not_fit(other: NetworkConfig, tmp_path: Path) -> None:
    save_published(build(TINY), tmp_path / "other.pth")
    with pytest.raises(ConversionError, match="does not fit the network asked for: m"):
        from_published(tmp_path / "other.pth", other)


class Intruder:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", [*PICKLES, "raw"])
def test_a_pickle_that_runs_code_is_refused_unrun(form: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    evil = {"state_dict": Intruder(f"touch {trace}")}
    if form == "raw":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, **PICKLES[form])
    with pytest.raises(ConversionError, match="and was not unpickled; accepted are safe") as caught:
        from_published(path, TINY)
    assert "\n" not in str(caught.value)
    assert form == "raw" or "evil.pth holds posix.system" in str(caught.value)
    assert not trace.exists()


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "absent": lambda p: p.unlink(missing_ok=True),
    "folder": lambda p: p.mkdir(),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("version https://git-lfs"),
    "cut short": lambda p: p.write_bytes(p.with_name("whole").read_bytes()[:999]),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("spoil", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_file_is_named(
    spoil: Callable[[Path], Any], suffix: str, tmp_path: Path
) -> None:
    whole = {"a": torch.ones(500)}
    save_file(whole, tmp_path / "whole") if suffix != ".pth" else torch.save(
        whole, tmp_path / "whole"
    )
    path = tmp_path / f"bad{suffix}"
    spoil(path)
    with pytest.raises(ConversionError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=st.sampled_from(list(PICKLES.values())),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_any_damage_is_a_conversion_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, Any],
    cut: float,
    flips: list[tuple[float, int]],
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "weights.pth"
    torch.save({"state_dict": {"a": torch.ones(2, 3), "b": torch.zeros(3)}}, path, **options)
    damaged = bytearray(path.read_bytes())
    for place, value in flips:
        damaged[int(place * len(damaged))] = value
    path.write_bytes(damaged[: int(len(damaged) * max(cut, 0.5))])
    with contextlib.suppress(ConversionError):
        assert all(isinstance(t, Tensor) for t in read_weights(path).values())


def edit(change: Change) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return apply


def write_index(weight_map: Any) -> Callable[[Path], Any]:
    text = json.dumps({"weight_map": weight_map})
    return lambda folder: (folder / f"{WEIGHTS}.index.json").write_text(text)


def cut_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def edit_weights(change: Change) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = {n: t.clone() for n, t in load_file(folder / WEIGHTS).items()}
        change(weights)
        (folder / WEIGHTS).unlink()  # it is mapped into memory
        save_file(weights, folder / WEIGHTS)

    return apply


KEY = "transformer_blocks.0.attn2.to_k.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json cannot .* give a transformer f",
    ),
    "corrupt": (lambda f: (f / "config.json").write_text('{"_class'), "config.json cannot be read"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be re"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot be read"),
    "list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json cannot be read: 'list' obj",
    ),
    "class": (
        edit(lambda c: c.update(_class_name="UNet2DModel")),
        r"_class_name = 'UNet2DModel': must be one of \['PixArtTransformer2DModel', 'DiT",
    ),
    "no class": (edit(lambda c: c.pop("_class_name")), "_class_name = None: must be one of"),
    "list class": (
        edit(lambda c: c.update(_class_name=["a"])),
        r"_class_name = \['a'\]: must be on",
    ),
    "norm": (edit(lambda c: c.update(norm_type="layer_norm")), "norm_type = 'layer_norm': must be"),
    "another's norm": (
        edit(lambda c: c.update(norm_type="ada_norm_zero", num_embeds_ada_norm=5)),
        "_class_name = 'PixArtTransformer2DModel': must be DiTTransformer2DModel",
    ),
    "another word": (
        edit(lambda c: c.update(double_self_attention=True)),
        "double_self_attention = True: must be left out",
    ),
    "no depth": (edit(lambda c: c.pop("num_layers")), "num_layers = None: must be a whole number"),
    "text depth": (edit(lambda c: c.update(num_layers="2")), "num_layers = '2': must be a whole"),
    "half depth": (edit(lambda c: c.update(num_layers=2.5)), "num_layers = 2.5: must be a whole"),
    "true depth": (edit(lambda c: c.update(num_layers=True)), "num_layers = True: must be a whole"),
    "negative": (edit(lambda c: c.update(patch_size=-2)), "patch_size = -2: .* from 1 to 64"),
    "vast": (edit(lambda c: c.update(caption_channels=10**9)), "caption_channels = 1000000000: mu"),
    "giant": (
        edit(lambda c: c.update(num_layers=999, num_attention_heads=999, attention_head_dim=999)),
        "num_layers = 999: must be of fewer parameters",
    ),
    "odd width": (
        edit(lambda c: c.update(attention_head_dim=6)),
        "cross_attention_dim = 24: must be 12",
    ),
    "impossible": (
        edit(lambda c: c.update(attention_head_dim=5)),
        "network.width = 10: 2-D positions need a multiple of 4",
    ),
    "output": (edit(lambda c: c.update(out_channels=5)), "out_channels = 5: must be 4"),
    "scale": (
        edit(lambda c: c.update(interpolation_scale=-1)),
        "interpolation_scale = -1: must be",
    ),
    "NaN scale": (
        edit(lambda c: c.update(interpolation_scale=float("nan"))),
        "interpolation_scale = nan: must be above 0",
    ),
    "text scale": (
        edit(lambda c: c.update(interpolation_scale="2")),
        "interpolation_scale = '2': must be above 0",
    ),
    "activation": (
        edit(lambda c: c.update(activation_fn="geglu")),
        "activation_fn = 'geglu': must be gelu-approximate",
    ),
    "other depth": (edit(lambda c: c.update(num_layers=3)), r"missing \['transformer_blocks.2"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} cannot be read"),
    "cut short": (cut_weights, f"{WEIGHTS} cannot be read"),
    "missing": (
        edit_weights(lambda w: w.pop(KEY)),
        rf"missing \['{KEY} \[24, 24\]'\] \(1 in all\)",
    ),
    "mis-shaped": (
        edit_weights(lambda w: w.update({KEY: torch.ones(2, 2)})),
        rf"missing \['{KEY} \[24, 24\]'\] \(1 in all\), extra \['{KEY} \[2, 2\]'\]",
    ),
    "extra": (
        edit_weights(lambda w: w.update({"norm_out.weight": torch.ones(1)})),
        r"extra \['norm_out.weight \[1\]'\]",
    ),
    "NaN": (edit_weights(lambda w: w[KEY].fill_(torch.nan)), rf"no finite numbers in \['{KEY}'\]"),
    "outside": (
        write_index({KEY: "../other.safetensors"}),
        "weight_map must list what its files",
    ),
    "pickled": (write_index({KEY: "weights.bin"}), "weight_map must list what its files"),
    "no map": (write_index([]), "weight_map must list what its files"),
    "in part": (write_index({KEY: WEIGHTS}), "weight_map must list what its files"),
    "no shard": (write_index({KEY: "a-1.safetensors"}), "a-1.safetensors cannot be read"),
    "a shard alone": (write_index({}), "missing"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_named(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save_diffusers(build(TINY), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConversionError, match=message) as caught:
        from_diffusers(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_dit_whose_blocks_disagree_about_the_timestep_is_no_dit_of_ours(tmp_path: Path) -> None:
    save_diffusers(build(DIT), tmp_path)
    place = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    edit_weights(lambda w: w[place].add_(1e-3))(tmp_path)
    with pytest.raises(ConversionError, match=rf"{place} differs from block 0's.* for all blocks"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (replace(TINY, mlp_ratio=2.0), "PixArtTransformer2DModel cannot express mlp_ratio = 2.0"),
        (replace(TINY, qk_norm=True), "PixArtTransformer2DModel cannot express qk_norm = True"),
        (replace(TINY, adaln="block"), "PixArtTransformer2DModel cannot express adaln = 'block'"),
        (
            replace(TINY, text_in="context"),
            "PixArtTransformer2DModel cannot express text_in = 'con",
        ),
        (
            replace(DIT, position_scale=2.0, mlp_ratio=3.0),
            "DiTTransformer2DModel cannot express mlp_ratio = 3.0, position_scale = 2.0",
        ),
    ],
)
def test_what_diffusers_has_no_word_for_is_refused(
    config: NetworkConfig, lost: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=lost):
        save_diffusers(build_network(config), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
