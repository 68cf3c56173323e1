"""The command line's last line of defence: one line on stderr, exit code 2, no traceback."""

from pathlib import Path

import pytest
from processes import run

from pixart_cluster.local import RayError, local_ray


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "digits", "--dry-run", "--set", "train.num_wrkers=2"],
         "train.num_wrkers: unknown key; did you mean 'num_workers'?"),
        (["run", "nowhere.yaml"],
         "recipe nowhere.yaml: cannot be read (No such file or directory)"),
        (["convert", "nowhere", "new", "--to", "snapshot"],
         "nowhere: there is no such file or folder"),
    ],
)  # fmt: skip
def test_a_typo_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert not list(tmp_path.iterdir()), "nothing is made before the recipe is understood"


def test_a_machine_too_busy_for_ray_is_told_so_after_some_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray raises when its agent is not up in 20 seconds, as at a load of 8 on 2 cores."""
    tried = list[str]()

    def give_up(**_: object) -> None:
        tried.append("init")
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr("ray.init", give_up)
    refused = pytest.raises(RayError, match=r"did not start in 3 tries.* busy \(load .* cores\)")
    with refused, local_ray(tmp_path / "logs"):
        pytest.fail("there is no Ray")
    assert len(tried) == 3
