"""Plug-ins: one file, one decorator, no edit elsewhere; a user's own by its import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from rlsys.config.errors import UserError

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Names of one kind of plug-in.

    Args:
        kind: what the entries are, as it appears in error messages ("reward").
        package: the package whose modules are imported on the first look-up, so that a new file
            in it is found without an edit elsewhere.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the function or class available under ``name``."""

        def add(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
                raise ValueError(f"{self.kind} '{name}' is registered twice: {known.__module__} and {entry.__module__}")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        self._scan()
        return sorted(self._entries)

    def get(self, name: str, *, where: str) -> T:
        """The plug-in called ``name``, or the object at the import path ``package.module.object``.

        Args:
            name: a registered name, or an import path (``my_rewards.length`` or ``my_rewards:length``).
            where: the config key that asked, for the error message.

        Raises:
            UserError: nothing of that name, or the import fails.
        """
        self._scan()
        if name in self._entries:
            return self._entries[name]
        if "." in name or ":" in name:
            return self._import(name, where)
        near = difflib.get_close_matches(name, self._entries, n=1)
        raise UserError(
            f"there is no {self.kind} called '{name}'",
            where=where,
            fix=(f"did you mean '{near[0]}'? " if near else "")
            + f"known: {', '.join(self.names())}; or give the import path of your own (module.name)",
        )

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")

    def _import(self, path: str, where: str) -> T:
        module_name, _, attribute = path.replace(":", ".").rpartition(".")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever a user's module does while it is imported
            raise UserError(
                f"the {self.kind} '{path}' cannot be imported: {type(error).__name__}: {error}",
                where=where,
                fix=f"check that module '{module_name}' is installed or on PYTHONPATH and defines '{attribute}'",
            ) from error


def reads(*names: str) -> Callable[[T], T]:
    """Decorator: the plug-in also wants these keyword arguments from whoever calls it; they are no options.

    What there is to read stands in the package of the plug-in's kind.
    """

    def mark(function: T) -> T:
        function.reads = names  # type: ignore[attr-defined]
        return function

    return mark


def reads_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """What :func:`reads` declared; nothing for a plain function."""
    return getattr(function, "reads", ())


def check_options(function: Callable[..., Any], options: dict[str, Any], *, where: str) -> None:
    """Options of a plug-in against its keyword-only arguments and their annotations.

    Args:
        where: config key of the options, for error messages.

    Raises:
        UserError: an option that ``function`` does not take (naming the nearest one), of another type, or not finite.
    """
    parameters = inspect.signature(function).parameters.values()
    given = reads_of(function)
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in options:
        if name in given or (name not in known and not anything):
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"unknown option '{name}'",
                where=f"{where}.{name}",
                fix=(f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(known) or 'none'}",
            )
    _check_types(function, options, where)


def _check_types(function: Callable[..., Any], options: dict[str, Any], where: str) -> None:
    """One without an annotation that can be checked passes."""
    if not options:
        return
    from pydantic import PydanticUserError, TypeAdapter, ValidationError  # reward processes never get here

    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"option '{name}' must be a finite number, not {value}", where=f"{where}.{name}")
        try:
            if name in hints:
                TypeAdapter(hints[name]).validate_python(value, strict=True)
        except PydanticUserError:
            continue
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise UserError(f"option '{name}': {reason}, got {value!r}", where=f"{where}.{name}") from None
