"""Tables of functions that settings name: metrics, preprocessors, postprocessors, readers of packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from softprompt_jax.config import nearest

F = TypeVar("F", bound=Callable)


class Registry(dict[str, F]):
    """Functions by name; `@TABLE.register("name")` before a function adds it."""

    def register(self, name: str) -> Callable[[F], F]:
        """Return what adds a function under this name."""

        def add(function: F) -> F:
            self[name] = function
            return function

        return add

    def expected(self, name: str) -> str:
        """Return the end of a message about an unknown name: the names there are, and the nearest."""
        return f"expected one of {', '.join(sorted(self))}{nearest(name, self)}"
