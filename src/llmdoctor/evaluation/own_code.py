"""A user's own function, named on the command line as `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from llmdoctor.errors import UserError


def own_function(path: str, what: str) -> Callable[..., Any]:
    """The callable that `path`, written `package.module:function`, names; the current folder is looked into last.

    Raises:
        UserError: the module cannot be imported or holds no such callable; `what` (say "scorer") begins the message.
    """
    module_name, _, attribute = path.partition(":")
    module = _import_from_here(module_name, path, what)
    found = getattr(module, attribute, None) if attribute else None
    if not callable(found):
        raise UserError(f"{what} {path!r}: module {module_name!r} has no function {attribute!r}")
    return found


def _import_from_here(module_name: str, path: str, what: str) -> Any:
    # An installed command does not look into the current folder, where a user's own module most often lies. It stays on
    # the path, last, because the module may import its neighbours as late as when it is called.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{what} {path!r}: cannot import {module_name!r} ({type(error).__name__}: {error})") from error
