"""Registries of what a recipe can name: methods, tasks, merge rules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, TypeVar

from gradpruner.common.errors import ConfigError, GradPrunerError

T = TypeVar("T")


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' if one of `allowed` is close to `word`, else ''."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_known(
    kind: str,
    names: str | Iterable[str],
    known: Collection[str],
    error: type[GradPrunerError] = ConfigError,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Raises an error for the first unknown name; the message lists the known ones and suggests the closest.

    Args:
        kind: What the names stand for, singular ("norm").
        names: One name or several, as given by a user.
        known: The allowed names.
        error: Type of the error to raise.
        renamed: Former name -> current name, which is suggested instead of the closest.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in known:
            continue
        now = (renamed or {}).get(name)
        meant = f" Did you mean '{now}'?" if now else suggest(name, known)
        raise error(f"Unknown {kind} '{name}'.{meant}", hint=f"Allowed: {', '.join(known)}.")


class Registry(Generic[T]):
    """A dictionary of named entries whose failed lookup lists the names and suggests the closest.

    Args:
        kind: What an entry is called in messages, singular ("task").
        renamed: Former name -> current name, for suggestions.
    """

    def __init__(self, kind: str, renamed: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._renamed = dict(renamed or {})
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers the decorated object as `name`, which must be new."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self.kind} '{name}' is registered twice.")
            self._entries[name] = entry
            return entry

        return add

    def find(self, name: str) -> T:
        """Returns the entry called `name`.

        Raises:
            ConfigError: If there is none. The message lists the names and suggests the closest one.
        """
        check_known(self.kind, name, self.names(), renamed=self._renamed)
        return self._entries[name]

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._entries)
