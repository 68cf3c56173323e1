"""The recipe as the command line reads it: a pipeline's, with how its model is served."""

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

from pixart_cluster.submit import GIVEN, GIVEN_VARIABLE
from pixart_jobs.recipe import RECIPES, Recipe
from pixart_platform.recipe import find_file, load_recipe
from pixart_serve.settings import ServeSettings


class FullRecipe(Recipe):
    """Everything from images to the service."""

    serve: ServeSettings = ServeSettings()


def read_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> FullRecipe:
    """Load a built-in recipe by name, a file, or what a Ray job was given. Raises RecipeError."""
    if name_or_path == GIVEN:
        with NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(os.environ.get(GIVEN_VARIABLE, ""))
            file.flush()
            return load_recipe(Path(file.name), FullRecipe, overrides)
    return load_recipe(find_file(name_or_path, RECIPES, "recipe"), FullRecipe, overrides)
