"""Recipes: counts, overrides, and errors that name the place, the value and the way out."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from pixart_platform.errors import RecipeError
from pixart_platform.recipe import Count, Section, digest_of, load_recipe

COUNT: TypeAdapter[int] = TypeAdapter(Count)
SUFFIXES = {"": 0, "k": 3, "M": 6, "B": 9}


class Optimizer(Section):
    learning_rate: float = Field(gt=0)


class Stage(Section):
    images: Count = Field(1, ge=1)
    optimizer: Optimizer = Optimizer(learning_rate=0.1)


class Document(Section):
    name: str
    seed: int = 0
    sides: tuple[int, ...] = (32,)
    stages: dict[str, Stage] = Field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> Document:
    return load_recipe(write(folder, text), Document, overrides)


def fail(folder: Path, text: str, *overrides: str) -> str:
    """The message of the error that ``text`` must cause."""
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


@repeatable
@given(st.integers(0, 10**15), st.sampled_from(list(SUFFIXES)))
def test_a_count_written_with_a_suffix_is_exact(count: int, suffix: str) -> None:
    written = f"{Decimal(count).scaleb(-SUFFIXES[suffix]):f}{suffix}"
    assert COUNT.validate_python(written) == count


@repeatable
@given(st.integers(0, 10**12))
def test_a_count_may_be_grouped_with_underscores(count: int) -> None:
    assert COUNT.validate_python(f"{count:_}") == count


@pytest.mark.parametrize("text", ["", "2 M", "2m", "M", "-5", "1e6", "2MM", "0x10", "two", "1.M"])
def test_what_is_no_count_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a count; write 2000000"):
        COUNT.validate_python(text)


def test_a_fraction_of_an_image_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'1.0005k' is not a whole number"):
        COUNT.validate_python("1.0005k")


def test_an_unknown_key_names_the_file_the_path_and_the_nearest_key(tmp_path: Path) -> None:
    message = fail(tmp_path, "name: x\nstages: {align: {imagse: 5}}")
    place = f"recipe {tmp_path / 'recipe.yaml'}: stages.align.imagse"
    assert message == f"{place}: unknown key; did you mean 'images'?"


def test_a_key_like_no_other_of_its_section_says_which_there_are(tmp_path: Path) -> None:
    message = fail(tmp_path, "name: x\nzzzzzz: 1")
    assert message.endswith("zzzzzz: unknown key; there are name, seed, sides, stages")
    message = fail(tmp_path, "name: x\nstages: {align: {learning_rate: 1}}")
    assert message.endswith("learning_rate: unknown key; there are images, optimizer")


def test_a_bad_value_names_its_place_and_itself(tmp_path: Path) -> None:
    message = fail(tmp_path, "name: x\nstages: {align: {images: 12 apples}}")
    assert "stages.align.images = '12 apples': '12 apples' is not a count" in message


def test_a_value_out_of_range_says_the_range(tmp_path: Path) -> None:
    message = fail(tmp_path, "name: x\nstages: {align: {optimizer: {learning_rate: -1}}}")
    assert "stages.align.optimizer.learning_rate = -1" in message
    assert "greater than 0" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert fail(tmp_path, "seed: 1").endswith("name: is required")


def test_every_fault_gets_a_line(tmp_path: Path) -> None:
    assert len(fail(tmp_path, "seed: x\nsides: [a]\nnome: y").splitlines()) == 4


def test_a_fault_of_a_whole_section_does_not_print_the_section(tmp_path: Path) -> None:
    class Strict(Document):
        def model_post_init(self, _: Any) -> None:
            raise ValueError("stages.align.images is less than one batch")

    path = write(tmp_path, "name: x\nseed: 5")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, Strict)
    assert str(caught.value) == f"recipe {path}: stages.align.images is less than one batch"


def test_an_override_sets_a_nested_value_and_leaves_the_rest(tmp_path: Path) -> None:
    text = "name: x\nseed: 3\nstages: {align: {images: 5}, pixels: {images: 6}}"
    found = load(tmp_path, text, "stages.align.images=2M", "sides=[8, 16]")
    assert found.stages["align"].images == 2_000_000
    assert found.stages["pixels"].images == 6
    assert (found.seed, found.sides) == (3, (8, 16))


def test_an_override_makes_the_sections_it_needs(tmp_path: Path) -> None:
    found = load(tmp_path, "name: x", "stages.align.optimizer.learning_rate=0.5")
    assert found.stages["align"].optimizer.learning_rate == 0.5


def test_of_two_overrides_the_last_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "name: x", "seed=1", "seed=2").seed == 2


def test_an_override_of_one_stage_does_not_reach_another_through_a_yaml_alias(
    tmp_path: Path,
) -> None:
    text = """
name: x
stages:
  pixels: {optimizer: &optimizer {learning_rate: 0.1}}
  align: {optimizer: *optimizer}
"""
    stages = load(tmp_path, text, "stages.align.optimizer.learning_rate=0.5").stages
    assert stages["align"].optimizer.learning_rate == 0.5
    assert stages["pixels"].optimizer.learning_rate == 0.1


@pytest.mark.parametrize("override", ["seed", "=5", "stages..images=5", ".seed=1", "seed.=1"])
def test_an_override_without_path_or_value_says_how_to_write_it(
    tmp_path: Path, override: str
) -> None:
    message = fail(tmp_path, "name: x", override)
    assert message == f"--set {override}: write it as path.to.key=value"


def test_an_override_through_a_value_names_it(tmp_path: Path) -> None:
    message = fail(tmp_path, "name: x\nseed: 1", "seed.deep=5")
    assert message == "--set seed.deep=5: seed is a value, not a section"


def test_an_override_with_a_broken_value_is_named(tmp_path: Path) -> None:
    assert "--set sides=[1,: the value is not valid YAML" in fail(tmp_path, "name: x", "sides=[1,")
    twice = "stages.a={images: 1, images: 2}"
    assert f"--set {twice}: the value is not valid YAML" in fail(tmp_path, "name: x", twice)


def test_an_override_of_an_unknown_key_gets_a_suggestion(tmp_path: Path) -> None:
    assert "sede: unknown key; did you mean 'seed'?" in fail(tmp_path, "name: x", "sede=5")


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    assert "not valid YAML at line 2: " in fail(tmp_path, "name: x\nstages: {a: [1, }\n")


def test_a_key_given_twice_is_refused_by_line_rather_than_half_dropped(tmp_path: Path) -> None:
    message = fail(tmp_path, "name: x\nstages:\n  a: {images: 1}\n  a: {images: 2}\n")
    assert message.endswith("not valid YAML at line 4: a is given twice")
    assert "not valid YAML" in fail(tmp_path, "name: x\n[a, b]: 1\n[a, b]: 1\n")


def test_a_key_beside_one_that_is_merged_is_not_given_twice(tmp_path: Path) -> None:
    text = "name: x\nstages:\n  a: &a {images: 1}\n  b: &b {<<: *a, images: 2}\n  c: {<<: *b}\n"
    assert load(tmp_path, text).stages["c"].images == 2


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match=r"recipe .*recipe.yaml: not valid YAML"):
        load_recipe(path, Document)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml: cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml", Document)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n", "list"), ("hello", "str")])
def test_a_file_without_sections_says_what_it_holds(tmp_path: Path, text: str, kind: str) -> None:
    assert fail(tmp_path, text).endswith(f"must be a mapping of sections, not {kind}")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def reverse_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reverse_keys(value[key]) for key in reversed(value)}
    return [reverse_keys(item) for item in value] if isinstance(value, list) else value


@repeatable
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=5))
def test_a_digest_does_not_depend_on_the_order_of_keys(document: dict[str, Any]) -> None:
    assert digest_of(reverse_keys(document)) == digest_of(document)


def test_a_digest_changes_with_any_value_and_stays_the_same_over_releases() -> None:
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})
    assert digest_of({"a": 1, "b": {"c": [1, "x"]}}) == "247aee80f827d6e2"
