"""PixArt and DiT: the published sizes, and diffusers' outputs on the same random weights."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pixart_models.config import ConfigError, ModelInputError, NetworkConfig, get_preset
from pixart_models.dit import DiT
from pixart_models.layers import (
    MaskError,
    Positions,
    attend_packed,
    pack_padded,
    pack_text,
    sincos_positions,
)
from pixart_models.pixart import PixArt
from pixart_models.snapshot import build_network
from pixart_models.token_drop import TokenDrop

WIDTH, HEADS, TEXT_WIDTH = 24, 2, 10
TINY = NetworkConfig(depth=2, width=WIDTH, heads=HEADS, sample_size=8, text_width=TEXT_WIDTH)
TINY_SIZED = NetworkConfig(
    depth=2, width=WIDTH, heads=HEADS, sample_size=16, text_width=TEXT_WIDTH,
    position_scale=2.0, size_condition=True,
)  # fmt: skip
TINY_DIT = NetworkConfig(
    architecture="dit", depth=2, width=WIDTH, heads=HEADS, sample_size=8, num_classes=5
)
RENAMES = {  # ours, which is the published checkpoints', to diffusers'
    "x_embedder.": "pos_embed.",
    "csize_embedder.": "adaln_single.emb.resolution_embedder.",
    "ar_embedder.": "adaln_single.emb.aspect_ratio_embedder.",
    "t_embedder.": "adaln_single.emb.timestep_embedder.",
    ".mlp.0.": ".linear_1.",
    ".mlp.2.": ".linear_2.",
    "t_block.1.": "adaln_single.linear.",
    "y_embedder.y_proj.fc": "caption_projection.linear_",
    "blocks.": "transformer_blocks.",
    ".cross_attn.q_linear.": ".attn2.to_q.",
    ".cross_attn.proj.": ".attn2.to_out.0.",
    ".attn.proj.": ".attn1.to_out.0.",
    ".mlp.fc1.": ".ff.net.0.proj.",
    ".mlp.fc2.": ".ff.net.2.",
    ".adaLN_modulation.1.": ".norm1.linear.",
    "final_layer.norm1.linear.": "proj_out_1.",
    "final_layer.scale_shift_table": "scale_shift_table",
}
FUSED = {
    ".attn.qkv.": (".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    ".cross_attn.kv_linear.": (".attn2.to_k.", ".attn2.to_v."),
}


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Give every parameter, the zero-initialised ones too, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = max(parameter.shape[-1], 4)
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rename(name: str) -> str:
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def to_diffusers(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Published names to diffusers', fused projections cut into theirs."""
    for name, tensor in state.items():
        cut = next((fused for fused in FUSED if fused in name), None)
        if cut is None:
            yield rename(name), tensor
        else:
            parts = tensor.chunk(len(FUSED[cut]))
            for theirs, part in zip(FUSED[cut], parts, strict=True):
                yield rename(name.replace(cut, theirs)), part


def build_diffusers_pixart(config: NetworkConfig, weights: Mapping[str, Tensor]) -> Any:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    reference: Any = PixArtTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
        in_channels=config.latent_channels, out_channels=config.out_channels,
        num_layers=config.depth, cross_attention_dim=config.width, sample_size=config.sample_size,
        interpolation_scale=config.position_scale, caption_channels=config.text_width,
        use_additional_conditions=config.size_condition,
    )  # fmt: skip
    theirs = {n.replace("final_layer.linear", "proj_out"): t for n, t in to_diffusers(weights)}
    reference.load_state_dict(theirs)
    return reference.eval()


def build_diffusers_dit(config: NetworkConfig, weights: Mapping[str, Tensor]) -> Any:
    """diffusers copies both embedders into each block, and spaces the frequencies by 1/127.

    The published weights were trained with 1/128 (facebookresearch/DiT, TimestepEmbedder), so the
    reference is set to that.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    reference: Any = DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
        in_channels=config.latent_channels, out_channels=config.out_channels,
        num_layers=config.depth, sample_size=config.sample_size,
        num_embeds_ada_norm=config.num_classes, norm_eps=1e-6,
    )  # fmt: skip
    theirs = dict(to_diffusers(weights))
    for i, block in enumerate(reference.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        emb = f"transformer_blocks.{i}.norm1.emb"
        labels = weights["y_embedder.embedding_table.weight"]
        theirs[f"{emb}.class_embedder.embedding_table.weight"] = labels
        for n in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
            shared = theirs[f"adaln_single.emb.timestep_embedder.{n}"]
            theirs[f"{emb}.timestep_embedder.{n}"] = shared
    theirs = {n.replace("final_layer.linear", "proj_out_2"): t for n, t in theirs.items()}
    own = reference.state_dict()
    reference.load_state_dict({n: t for n, t in theirs.items() if n in own})
    return reference.eval()


@pytest.fixture(scope="module")
def pixart() -> PixArt:
    network = PixArt(TINY)
    randomize(network)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def peer(pixart: PixArt) -> Any:
    return build_diffusers_pixart(TINY, pixart.state_dict())


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("pixart-xl-2-256", 610_856_096),
        ("pixart-xl-2-512", 610_856_096),
        ("pixart-xl-2-1024", 611_349_152),
        ("pixart-sigma-xl-2-1024", 610_856_096),
        ("dit-xl-2-256", 674_834_720),
    ],
)
def test_parameter_count_is_the_published_one(preset: str, published: int) -> None:
    with torch.device("meta"):
        network = build_network(get_preset(preset))
    assert sum(p.numel() for p in network.parameters()) == published


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_smaller_networks_have_the_size_of_dit_table_1(size: str, millions: int) -> None:
    with torch.device("meta"):
        network = build_network(get_preset(f"dit-{size}-2-256"))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    h=st.integers(1, 8), w=st.integers(1, 8), seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), rest=st.integers(0, 2),
)  # fmt: skip
@example(h=4, w=4, seed=0, lengths=[1, 2, 3, 4, 5, 6, 7], rest=0)
def test_pixart_equals_diffusers_for_every_text_length_and_shape(
    pixart: PixArt, peer: Any, h: int, w: int, seed: int, lengths: list[int], rest: int
) -> None:
    batch, longest = len(lengths), max(lengths) + rest
    latents, text = draw(batch, 4, 2 * h, 2 * w, seed=seed), draw(batch, longest, 10, seed=seed + 1)
    timesteps = 999 * torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        ours = pixart(latents, timesteps, text, mask)
        theirs = peer(latents, text, timesteps, encoder_attention_mask=mask).sample
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_size_condition_and_position_scale_equal_diffusers() -> None:
    network = PixArt(TINY_SIZED).eval()
    randomize(network)
    reference = build_diffusers_pixart(TINY_SIZED, network.state_dict())
    latents, text = draw(2, 4, 16, 16), draw(2, 3, TEXT_WIDTH, seed=2)
    timesteps = torch.tensor([10.0, 900.0])
    sizes = torch.tensor([[1024.0, 512.0, 2.0], [640.0, 1280.0, 0.5]])
    added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    with torch.inference_mode():
        ours = network(latents, timesteps, text, sizes=sizes)
        theirs = reference(latents, text, timesteps, added_cond_kwargs=added).sample
        swapped = network(latents, timesteps, text, sizes=sizes.flip(0))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, swapped, atol=1e-2)


def test_size_condition_refuses_to_guess_sizes() -> None:
    network = PixArt(TINY_SIZED)
    inputs = draw(1, 4, 16, 16), torch.tensor([1.0]), draw(1, 1, TEXT_WIDTH)
    with pytest.raises(ModelInputError, match=r"sizes \(1, 3\).*given: none"):
        network(*inputs)
    with pytest.raises(ModelInputError, match=r"given: \(1, 2\)"):
        network(*inputs, sizes=draw(1, 2))


@pytest.mark.parametrize("config", [TINY, TINY_DIT])
def test_latents_that_patches_do_not_tile_are_refused(config: NetworkConfig) -> None:
    condition = torch.tensor([0]) if config.architecture == "dit" else draw(1, 2, TEXT_WIDTH)
    with pytest.raises(ModelInputError, match="latents of 9x8 cannot be cut into patches of 2x2"):
        build_network(config)(draw(1, 4, 9, 8), torch.tensor([5.0]), condition)


def test_dit_equals_diffusers_for_every_label_including_null() -> None:
    network = DiT(TINY_DIT).eval()
    randomize(network)
    reference = build_diffusers_dit(TINY_DIT, network.state_dict())
    latents, labels = draw(6, 4, 8, 8), torch.arange(6)
    timesteps = torch.tensor([0.0, 1.0, 77.7, 500.0, 998.0, 999.0])
    with torch.inference_mode():
        ours = network(latents, timesteps, labels)
        theirs = reference(latents, timesteps, labels).sample
    assert torch.equal(network.null_label(2, labels.device), labels[[5, 5]])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_masked_text_equals_trimmed_text(pixart: PixArt, lengths: list[int], seed: int) -> None:
    latents, timesteps = draw(len(lengths), 4, 4, 4, seed=seed), torch.full((len(lengths),), 300.0)
    text = draw(len(lengths), 9, TEXT_WIDTH, seed=seed + 1)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        together = pixart(latents, timesteps, text, mask)
        for i, length in enumerate(lengths):
            alone = pixart(latents[i, None], timesteps[i, None], text[i, None, :length])
            torch.testing.assert_close(together[i, None], alone, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    mask=st.lists(
        st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=4
    )
)
def test_packed_attention_equals_masked_attention(mask: list[list[bool]]) -> None:
    """Any mask, holes included: forward and every gradient."""
    real = torch.tensor(mask)
    query = draw(len(mask), 5, 2, 8).requires_grad_()
    kv = draw(len(mask), 6, 2, 2, 8, seed=2).requires_grad_()
    whole = [t.transpose(1, 2) for t in (query, kv[:, :, 0], kv[:, :, 1])]
    masked = nn.functional.scaled_dot_product_attention(
        whole[0], whole[1], whole[2], attn_mask=real[:, None, None]
    ).transpose(1, 2)
    text = pack_padded(kv.flatten(2), real)
    assert len(text.tokens) == real.sum()
    key, value = text.tokens.view(-1, 2, 2, 8).unbind(1)
    packed = attend_packed(query, key, value, text)
    torch.testing.assert_close(packed, masked, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(masked.square().sum(), (query, kv), retain_graph=True)
    found = torch.autograd.grad(packed.square().sum(), (query, kv))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"shape \(2, 4\); with text of shape \(2, 3, 10\)"),
        (torch.ones(2, 3), r"torch.float32 of shape \(2, 3\)"),
        (torch.tensor([[True] * 3, [False] * 3]), r"rows \[1\] are all False"),
    ],
)
def test_a_wrong_mask_says_what_it_must_be(pixart: PixArt, mask: Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        pixart(draw(2, 4, 4, 4), torch.tensor([1.0, 2.0]), draw(2, 3, TEXT_WIDTH), mask)


def test_a_caption_without_tokens_is_named() -> None:
    with pytest.raises(MaskError, match="caption 1 has no tokens"):
        pack_text([draw(2, 4), draw(0, 4)])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_compiles_without_graph_breaks_for_any_text_lengths(qk_norm: bool) -> None:
    network = PixArt(replace(TINY, qk_norm=qk_norm)).eval()
    randomize(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    latents, timesteps = draw(3, 4, 8, 8), torch.tensor([1.0, 500.0, 999.0])
    for lengths in ((3, 1, 7), (2, 5, 4), (1, 1, 1)):
        text = pack_text([draw(n, TEXT_WIDTH, seed=n) for n in lengths])
        with torch.no_grad():
            found, wanted = compiled(latents, timesteps, text), network(latents, timesteps, text)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY_DIT])
def test_recomputing_blocks_changes_no_gradient(config: NetworkConfig) -> None:
    network = build_network(config)
    randomize(network)
    condition = torch.tensor([0]) if config.architecture == "dit" else draw(1, 3, TEXT_WIDTH)
    gradients = []
    for recompute in (False, True):
        network.checkpoint_blocks = recompute
        network.zero_grad()
        network(draw(1, 4, 8, 8), torch.tensor([5.0]), condition).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_normalised_queries_and_keys_bound_the_attention_logits() -> None:
    network = PixArt(replace(TINY, qk_norm=True)).eval()
    randomize(network)
    names = [n for n, _ in network.named_parameters() if "_norm" in n]
    assert len(names) == 2 * 2 * TINY.depth
    blocks: Any = network.blocks
    for block in blocks:  # queries 1000 times larger mean the same picture
        block.attn.qkv.weight.data[:WIDTH] *= 1000
        block.attn.qkv.bias.data[:WIDTH] *= 1000
    inputs = draw(1, 4, 8, 8), torch.tensor([5.0]), draw(1, 3, TEXT_WIDTH)
    with torch.inference_mode():
        large = network(*inputs)
        for block in blocks:
            block.attn.qkv.weight.data[:WIDTH] /= 1000
            block.attn.qkv.bias.data[:WIDTH] /= 1000
        small = network(*inputs)
    assert small.abs().mean() > 0.1
    torch.testing.assert_close(large, small, rtol=1e-3, atol=1e-3)


def test_text_in_context_reaches_the_image_and_padding_does_not() -> None:
    torch.manual_seed(0)
    network = PixArt(replace(TINY, text_in="context"))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not any("cross_attn" in name for name in network.state_dict())
    latents, timesteps = draw(3, 4, 8, 12), torch.tensor([1.0, 400.5, 999.0])
    texts = [draw(n, TEXT_WIDTH, seed=n) for n in (2, 9, 5)]
    with torch.inference_mode():
        together = network(latents, timesteps, pack_text(texts))
        for i, text in enumerate(texts):
            alone = network(latents[i, None], timesteps[i, None], text[None])
            torch.testing.assert_close(together[i, None], alone, rtol=1e-5, atol=1e-5)
        others = network(latents, timesteps, pack_text(texts[::-1]))
    assert together.shape == (*latents.shape[:1], 8, 8, 12)
    assert not torch.allclose(together[0], others[0], atol=1e-2)
    torch.testing.assert_close(together[1], others[1])
    route = TokenDrop("mask", share=0.5, start=1, end=0, depth=2).choose(draw(3, 24))
    with pytest.raises(ModelInputError, match="token_drop with text_in = context"):
        network(latents, timesteps, pack_text(texts), route=route)


def test_rows_at_mixed_timesteps_equal_rows_alone(pixart: PixArt) -> None:
    latents, text = draw(3, 4, 8, 8), draw(3, 5, TEXT_WIDTH, seed=2)
    timesteps = torch.tensor([1.0, 400.5, 999.0])
    with torch.inference_mode():
        together = pixart(latents, timesteps, text)
        alone = [pixart(latents[i, None], timesteps[i, None], text[i, None]) for i in range(3)]
        shuffled = pixart(latents, timesteps.flip(0), text)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, shuffled, atol=1e-2)


@pytest.mark.parametrize("config", [TINY, TINY_DIT])
def test_an_untrained_network_predicts_zero(config: NetworkConfig) -> None:
    network = build_network(config)
    condition = torch.tensor([0]) if config.architecture == "dit" else draw(1, 2, TEXT_WIDTH)
    output = network(draw(1, 4, 8, 8), torch.tensor([5.0]), condition)
    assert output.shape == (1, 8, 8, 8)
    assert not output.any()


def test_an_untrained_text_path_does_no_harm() -> None:
    """Cross-attention starts at zero, so that a re-parameterised DiT keeps what it knows."""
    network = PixArt(TINY).eval()
    nn.init.normal_(network.final_layer.linear.weight)
    output = [
        network(draw(1, 4, 8, 8), torch.tensor([5.0]), draw(1, 2, TEXT_WIDTH, seed=seed))
        for seed in (1, 2)
    ]
    assert output[0].abs().mean() > 0.1
    assert torch.equal(output[0], output[1])


@settings(deadline=None, derandomize=True)
@given(h=st.integers(1, 6), w=st.integers(1, 6), base=st.integers(1, 8), factor=st.integers(1, 4))
def test_a_finer_grid_interpolates_the_coarse_one(h: int, w: int, base: int, factor: int) -> None:
    """512 -> 1024 px with position_scale 2: every second position is one the model has seen."""
    coarse = sincos_positions(8, h, w, base, 1.0).view(h, w, 8)
    fine = sincos_positions(8, h * factor, w * factor, base * factor, float(factor))
    every = fine.view(h * factor, w * factor, 8)[::factor, ::factor]
    torch.testing.assert_close(every, coarse, rtol=0, atol=1e-6)


def test_positions_encode_columns_first_then_rows() -> None:
    table = sincos_positions(8, 3, 5, 4, 1.0).view(3, 5, 8)
    columns, rows = table[..., :4], table[..., 4:]
    assert torch.equal(columns, columns[:1].expand(3, 5, 4))
    assert torch.equal(rows, rows[:, :1].expand(3, 5, 4))
    assert len(set(map(tuple, columns[0].tolist()))) == 5
    assert len(set(map(tuple, rows[:, 0].tolist()))) == 3


def test_remembered_positions_follow_shape_and_dtype() -> None:
    positions = Positions(8, base=4, scale=1.0)
    for h in range(1, Positions.MAX_SHAPES + 3):
        assert positions(h, 2, torch.zeros(1)).shape == (1, 2 * h, 8)
    fresh = sincos_positions(8, 1, 2, 4, 1.0)[None]
    assert torch.equal(positions(1, 2, torch.zeros(1)), fresh)
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert torch.equal(positions(1, 2, half), fresh.bfloat16())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 50, "heads": 4}, "width = 50 is not divisible by heads = 4; try width = 48"),
        ({"width": 6, "heads": 2}, "width = 6: 2-D positions need a multiple of 4"),
        ({"width": 16, "heads": 2, "size_condition": True}, "width = 16: size_condition needs"),
        ({"sample_size": 9}, "sample_size = 9 is no.* multiple of patch = 2"),
        ({"depth": 0}, "network.depth = 0: must be at least 1"),
        ({"latent_channels": -1}, "network.latent_channels = -1: must be at least 1"),
    ],
)
def test_an_impossible_shape_names_the_field_and_value(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworkConfig(**fields)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown network preset 'xl'; one of pixart-xl-2-256,"):
        get_preset("xl")


def test_a_preset_takes_overrides() -> None:
    assert get_preset("digits", depth=3) == replace(get_preset("digits"), depth=3)
    with pytest.raises(ConfigError, match="heads = 7"):
        get_preset("digits", heads=7)
