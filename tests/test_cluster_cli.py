"""The command line's last line of defence: one line on stderr, exit code 2, no traceback."""

from pathlib import Path

import pytest
from processes import run


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
