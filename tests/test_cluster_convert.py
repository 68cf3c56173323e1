"""``pixart convert``: others' weights become a snapshot that serves and trains, and back."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixart_cluster import cli
from pixart_jobs.stage import SNAPSHOT_SCHEMA
from pixart_models.autoencoder import load_autoencoder
from pixart_models.config import NetworkConfig, get_preset
from pixart_models.convert import from_diffusers, from_published
from pixart_models.dit import DiT
from pixart_models.drawing import Drawer, load_drawer
from pixart_models.export import export_pipeline, save_diffusers, save_published
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, build_network, load_network, save_snapshot
from pixart_models.text import load_text_encoder
from pixart_platform.manifest import verify_folder

MINI = get_preset("digits-mini", predict_variance=True)
ENCODERS = ["--autoencoder", "builtin:digits", "--text-encoder", "builtin:t5-tiny"]


def build(config: NetworkConfig) -> PixArt | DiT:
    """Random weights, the zero-initialised ones too."""
    network = build_network(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return network


def assert_same(found: Any, wanted: Any) -> None:
    assert found.config == wanted.config
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in found.state_dict().items())


@pytest.fixture(scope="module")
def drawer() -> Drawer:
    network = build(MINI)
    assert isinstance(network, PixArt)
    vae, text = load_autoencoder("builtin:digits"), load_text_encoder("builtin:t5-tiny", 48)
    config = SnapshotConfig(
        network=MINI, objective="iddpm", resolution=32, autoencoder=vae.source,
        autoencoder_digest=vae.digest, text_encoder=text.source, text_encoder_digest=text.digest,
    )  # fmt: skip
    return Drawer(config, network, vae, text)


@pytest.fixture
def snapshot(drawer: Drawer, tmp_path: Path) -> Path:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_snapshot(folder, drawer.config, drawer.network.state_dict())
    return folder


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process; its exit code and what it said on stderr."""

    def run(*arguments: str | Path, to: str) -> tuple[object, str]:
        command = ["pixart", "convert", *map(str, arguments), "--to", to]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return run


def draw(drawer: Drawer) -> Any:
    return drawer.draw(["a red three"], [1], steps=2)


def test_a_pipeline_becomes_a_snapshot_that_draws_the_same_and_back(
    drawer: Drawer, convert: Any, tmp_path: Path
) -> None:
    """The snapshot's encoders are the pipeline's own."""
    export_pipeline(drawer, tmp_path / "theirs")
    code, _ = convert(tmp_path / "theirs", tmp_path / "ours", to="snapshot")
    assert code == 0
    ours = load_drawer(tmp_path / "ours")
    np.testing.assert_array_equal(draw(ours), draw(drawer))
    assert ours.config.text_encoder == str(tmp_path / "theirs")
    assert ours.config.resolution == 32
    code, _ = convert(tmp_path / "ours", tmp_path / "again", to="pipeline")
    assert code == 0
    assert (tmp_path / "again" / "model_index.json").is_file()
    assert_same(from_diffusers(tmp_path / "again", max_tokens=120), ours.network)


def test_a_flow_pipeline_says_so_itself_and_distilled_weights_keep_their_solver(
    drawer: Drawer, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And encoders given by a relative path are found from any folder."""
    network: Any = build(replace(drawer.config.network, predict_variance=False))
    config = replace(drawer.config, network=network.config, objective="flow")
    export_pipeline(replace(drawer, config=config, network=network), tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    encoders = ["--autoencoder", "theirs", "--text-encoder", "theirs"]
    assert convert("theirs", "ours", *encoders, "--solver", "lcm", to="snapshot")[0] == 0
    monkeypatch.chdir("/")
    ours = load_drawer(tmp_path / "ours").config
    assert (ours.objective, ours.solver) == ("flow", "lcm")
    assert ours.text_encoder == str(tmp_path / "theirs")


def test_a_published_file_becomes_a_parent_to_train_from_and_a_file_again(
    drawer: Drawer, convert: Any, tmp_path: Path
) -> None:
    """The manifest is what training asks of a parent, and the registry of a version."""
    network = build(get_preset("digits-mini"))
    save_published(network, tmp_path / "released.pth")
    arguments = [tmp_path / "released.pth", tmp_path / "ours", "--preset", "digits-mini"]
    assert convert(*arguments, *ENCODERS, "--objective", "flow", to="snapshot") == (0, "")
    manifest = verify_folder(tmp_path / "ours")
    assert (manifest.schema, len(manifest.files)) == (SNAPSHOT_SCHEMA, 2)
    assert manifest.settings == {"imported": "released.pth"}
    config, found = load_network(tmp_path / "ours")
    assert_same(found, network)
    assert config == SnapshotConfig(**{**vars(drawer.config), "network": network.config,
                                       "objective": "flow"})  # fmt: skip
    for name in ("again.pth", "again.safetensors"):
        assert convert(tmp_path / "ours", tmp_path / name, to="published")[0] == 0
        assert_same(from_published(tmp_path / name, network.config), network)
    assert set(torch.load(tmp_path / "again.pth")) == {"state_dict"}


def test_a_dit_of_diffusers_becomes_a_parent_with_the_text_encoder_of_its_children(
    convert: Any, tmp_path: Path
) -> None:
    network = build(NetworkConfig(
        architecture="dit", depth=2, width=48, heads=4, latent_channels=8, sample_size=8,
        num_classes=3,
    ))  # fmt: skip
    save_diffusers(network, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()  # an empty folder may be filled
    assert convert(tmp_path / "theirs", tmp_path / "ours", *ENCODERS, to="snapshot") == (0, "")
    config, found = load_network(tmp_path / "ours")
    assert found.state_dict().keys() == network.state_dict().keys()
    assert (config.network.text_width, config.text_encoder) == (64, "builtin:t5-tiny")
    assert convert(tmp_path / "ours", tmp_path / "again", to="transformer") == (0, "")
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        tmp_path / "theirs" / "config.json"
    ).read_bytes()


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "to", "says"),
    [
        (["nowhere", "snapshot"], "snapshot", "snapshot exists; delete it, or give another place"),
        (["nowhere", "file.pth"], "published", "file.pth exists; delete it, or give another place"),
        (["nowhere", "far/away"], "pipeline", "far/away cannot be written: [Errno 2] No such file"),
        (["nowhere", "new"], "snapshot", "nowhere: there is no such file or folder"),
        (["nowhere", "new"], "pipeline", "nowhere holds no readable config.json"),
        (["file.pth", "new"], "snapshot", "file.pth does not say what it is; give its preset"),
        (["file.pth", "new", "--preset", "xl"], "snapshot", "unknown network preset 'xl'; one of"),
        (["lcm", "new", "--preset", "digits"], "pipeline", "--to pipeline takes all it needs from"),
        (["wide", "new", *ENCODERS], "snapshot", "wide does not say how it was trained; give its"),
        (["wide", "new", *ENCODERS, "--objective", "iddpm"], "snapshot", "does not predict a vari"),
        (["transformer", "new", *ENCODERS, "--objective", "flow"], "snapshot", "predicts a varian"),
        (["file.pth", "new", "--preset", "digits"], "snapshot", "file.pth is damaged or holds obj"),
        (["transformer", "new"], "snapshot", "'PixArtTransformer2DModel', but a 'AutoencoderKL'"),
        (["transformer", "new", "--preset", "digits"], "snapshot", "holds another network than di"),
        (["wide", "new", *ENCODERS, "--objective", "flow"], "snapshot", "wide reads latents "
         "and text of (4, 64) channels, the autoencoder and text encoder give (8, 64); name those"),
        (["lcm", "new"], "pipeline", "solver lcm with iddpm cannot be exported"),
        (["normed", "new"], "transformer", "cannot express qk_norm = True"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_costs_one_line_and_leaves_nothing(
    drawer: Drawer, snapshot: Path, convert: Any, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], to: str, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(snapshot.parent)
    Path("file.pth").write_bytes(b"no weights")
    save_diffusers(drawer.network, Path("transformer"))
    save_diffusers(build(get_preset("digits-mini", latent_channels=4)), Path("wide"))
    normed = build(get_preset("digits-mini", qk_norm=True))
    for name, config, network in (
        ("lcm", replace(drawer.config, solver="lcm"), drawer.network),
        ("normed", replace(drawer.config, network=normed.config), normed),
    ):
        Path(name).mkdir()
        save_snapshot(Path(name), config, network.state_dict())
    before = list_files(snapshot.parent)
    code, said = convert(*arguments, to=to)
    assert code == 2
    assert said.startswith("error: ")
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert list_files(snapshot.parent) == before
