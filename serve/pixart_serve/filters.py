"""Filters: an operator's own say on what is asked for and on what is drawn.

``serve.prompt_filter`` and ``serve.picture_filter`` name functions as ``module:function``, loaded
once by every replica and called on worker threads, several at a time. Each returns None to let
pass or a reason to refuse, which the caller is told. They fail closed: a filter that raises, or
answers anything else, refuses the request, and the log says where without what was judged.
"""

import importlib
import inspect
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixart_platform.errors import PixartError
from pixart_serve.contract import ApiError
from pixart_serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)


class FilterError(PixartError):
    """A filter that cannot be used."""


@dataclass(frozen=True)
class Filters:
    """``prompt(prompt, negative_prompt)`` and ``picture(pixels)``, (H, W, 3) uint8; None is unset.

    Checks raise ApiError 400 for what is refused, 500 when a filter fails.
    """

    prompt: Callable[[str, str], str | None] | None = None
    picture: Callable[[NDArray[np.uint8]], str | None] | None = None

    def check_prompt(self, prompt: str, negative_prompt: str) -> None:
        if self.prompt:
            reason = _judge("serve.prompt_filter", self.prompt, prompt, negative_prompt)
            _refuse("the prompt was refused", reason, "content_policy_violation")

    def check_picture(self, picture: NDArray[np.uint8]) -> None:
        if self.picture:
            reason = _judge("serve.picture_filter", self.picture, picture)
            _refuse("the picture was drawn and held back", reason, "moderation_blocked")


def _judge(setting: str, judge: Callable[..., str | None], *judged: object) -> str | None:
    try:
        reason: object = judge(*judged)
    except Exception as error:  # its message and its locals may hold the prompt
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"raised {type(error).__name__} in {last.name}, {last.filename}:{last.lineno}"
    else:
        if reason is None or (isinstance(reason, str) and reason):
            return reason
        fault = f"answered with {type(reason).__name__}, not None or a reason"
    _LOG.error("%s %s; the request is refused", setting, fault)
    raise ApiError(
        500, "a filter of this service failed, so the request is refused", code="filter_failed"
    ) from None


def _refuse(what: str, reason: str | None, code: str) -> None:
    if reason is not None:
        raise ApiError(400, f"{what}: {reason}", param="prompt", code=code)


def load_filters(settings: ServeSettings) -> Filters:
    """What the settings name. Raises FilterError, naming the setting."""
    return Filters(
        _load("serve.prompt_filter", settings.prompt_filter, ("prompt", "negative_prompt")),
        _load("serve.picture_filter", settings.picture_filter, ("picture",)),
    )


def _load(setting: str, name: str, parameters: tuple[str, ...]) -> Callable[..., Any] | None:
    if not name:
        return None
    module_name, colon, function_name = name.partition(":")
    where = f"{setting} = {name!r}"
    if not (module_name and colon and function_name.isidentifier()):
        raise FilterError(f"{where}: must be module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of others may raise anything
        raise FilterError(
            f"{where}: cannot import {module_name} ({type(error).__name__}: {error}); it must be "
            f"installed, or on PYTHONPATH, where replicas run"
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise FilterError(f"{where}: {module_name} has no function {function_name!r}")
    if inspect.iscoroutinefunction(function):
        raise FilterError(f"{where}: must be a plain function, which is called on a thread")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise FilterError(f"{where}: must take ({', '.join(parameters)}): {error}") from error
    except ValueError:  # some built-in callables do not say what they take
        pass
    return function
