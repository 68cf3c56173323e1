"""``pixart promote | rollback | lineage`` as typed, on tiny versions in a real registry."""

from pathlib import Path

import pytest
from serving_load import Models, register_models
from typer.testing import CliRunner

from pixart_cluster.cli import cli
from pixart_jobs.certainty import Figure
from pixart_jobs.promote import evaluation_tag
from pixart_platform.errors import RegistryError, StorageError

GOOD = {
    "digit_accuracy": Figure(0.95, 0.92, 0.97),
    "color_accuracy": Figure(0.99, 0.97, 1.0),
    "relation_accuracy": Figure(1.0, 0.98, 1.0),
}


def type_in(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Two versions, both measured; the first is champion."""
    made = register_models(tmp_path, 2)
    for version in made.registry.versions():
        made.registry.tag(version, evaluation_tag("digits", "b", "r", GOOD))
    return made


def test_a_version_is_promoted_and_rolled_back_by_one_line_each(
    models: Models, tmp_path: Path
) -> None:
    said = type_in("promote", "2", "--root", tmp_path, "--why", "reads better")
    assert said == "digits version 2 is champion\n"
    assert models.registry.aliases() == {"champion": 2, "previous": 1}
    assert type_in("rollback", "--root", tmp_path) == "digits version 1 is champion again\n"
    told = type_in("lineage", "2", "--registry", models.uri)
    assert "digits version 2" in told
    assert "digit_accuracy     0.950 (0.920 to 0.970), suite digits" in told
    assert "(before: version 1): reads better" in told


def test_what_cannot_be_found_is_named(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"'99'; it has champion \(version 1\), version 1"):
        type_in("promote", "99", "--root", tmp_path)
    with pytest.raises(StorageError, match="no run here"):
        type_in("lineage", "1", "--root", tmp_path / "nowhere")
    assert models.registry.aliases() == {"champion": 1}
