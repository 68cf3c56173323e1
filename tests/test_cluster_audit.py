"""What can be said of dependencies without a network: all are pinned, none lacks a known fix."""

import re
import tomllib
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version
from processes import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): Version(number)
    for name, _, number in (
        line.partition("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    )
    if number
}


def needed() -> set[NormalizedName]:
    """The packages that are here because the project or its tests need them, at any remove."""
    asked = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    asked += [Requirement(line) for line in PROJECT["dependency-groups"]["dev"]]
    found: set[NormalizedName] = set()
    seen: set[str] = set()
    while asked:
        one = asked.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        found.add(canonicalize_name(one.name))
        for line in requires(one.name) or ():
            more = Requirement(line)
            extras = [{"extra": extra} for extra in one.extras] or [{"extra": ""}]
            if not more.marker or any(more.marker.evaluate(extra) for extra in extras):
                asked.append(more)
    return found


def test_everything_the_project_needs_is_installed_as_it_is_pinned() -> None:
    packages = needed()
    assert len(packages) > 100
    drifted = {
        name: f"{version(name)}, pinned is {PINS.get(name)}"
        for name in packages
        if name not in PINS or Version(Version(version(name)).public) != PINS[name]
    }
    assert not drifted


def test_no_package_is_older_than_a_fix_that_the_threat_model_names() -> None:
    text = (REPOSITORY / "cluster" / "security.md").read_text()
    rows = re.findall(r"^\| (CVE-\S+|GHSA-\S+) \| (\S+) \| (\S+) \|", text, re.M)
    assert len(rows) >= 6
    for advisory, package, fixed in rows:
        assert Version(version(package)) >= Version(fixed), advisory
        assert PINS[canonicalize_name(package)] >= Version(fixed), advisory
