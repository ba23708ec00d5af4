"""Named things a recipe can ask for: methods, tasks, merge rules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, TypeVar

from gradpruner.common.errors import ConfigError, GradPrunerError

T = TypeVar("T")


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' when one of `allowed` is close to `word`, else ''."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_known(
    kind: str,
    names: str | Iterable[str],
    known: Collection[str],
    error: type[GradPrunerError] = ConfigError,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Checks names that a user gave.

    Args:
        kind: What the names stand for, singular ("norm").
        names: One name, or several.
        known: The names that are allowed.
        error: Raised for the first other name; the message lists `known` and suggests the closest one.
        renamed: Former name -> what it is called now, to be suggested instead.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in known:
            continue
        now = (renamed or {}).get(name)
        meant = f" Did you mean '{now}'?" if now else suggest(name, known)
        raise error(f"Unknown {kind} '{name}'.{meant}", hint=f"Allowed: {', '.join(known)}.")


class Registry(Generic[T]):
    """A dictionary whose failed look-up lists what there is.

    Args:
        kind: What the entries are called in messages, singular ("task").
        renamed: Former name -> what the entry is called now; only for messages.
    """

    def __init__(self, kind: str, renamed: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._renamed = dict(renamed or {})
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`; a name is taken only once."""

        def file(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self.kind} '{name}' is registered twice.")
            self._entries[name] = entry
            return entry

        return file

    def find(self, name: str) -> T:
        """Returns the entry called `name`.

        Raises:
            ConfigError: If there is none; the message lists the names and the nearest one.
        """
        check_known(self.kind, name, self.names(), renamed=self._renamed)
        return self._entries[name]

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._entries)
