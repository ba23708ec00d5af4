"""What both kinds of plan share: a method, the evidence for its choice, and a file checked on load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from gradpruner.common.errors import PlanError
from gradpruner.common.json_files import check_json, read_json, write_json
from gradpruner.common.printing import Printed, shown
from gradpruner.common.registry import suggest
from gradpruner.gradients.trace import same_model

FORMAT_VERSION = 1
METHOD_LIMIT = 200  # characters
_PARTS = {"layers": "whole layers", "width": "widths"}


class BasePlan(Printed):
    """A plan, saved as a small JSON file that people can read and edit.

    Attributes:
        method: The method that made the plan, or "explicit".
        evidence: What the choice is based on, as JSON values; "model" is the model's fingerprint, if known.
        kind: What is pruned: "layers" or "width".
        title: Name of this kind of plan in messages.
        json_fields: All fields its JSON may have.
    """

    method: str
    evidence: dict[str, Any]
    kind: ClassVar[str]
    title: ClassVar[str]
    json_fields: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        method = self.method
        if not isinstance(method, str) or len(method) > METHOD_LIMIT or not method.isprintable():
            raise PlanError(
                f"The method of the plan is {shown(method)}; a name is needed.",
                hint=f"Give one line of text, at most {METHOD_LIMIT} characters.",
            )

    def check_origin(self, fingerprint: str) -> None:
        """Raises PlanError if the plan was made from another model. A `fingerprint` of "" is not compared."""
        planned = self.evidence.get("model")
        if planned and fingerprint and not same_model(str(planned), fingerprint):
            raise PlanError(
                f"The plan was made from model {shown(str(planned))[1:-1]}; this is {fingerprint}.",
                hint="Make a plan on this model. Training it, or merging adapters into it, made it another.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads and validates a plan file.

        Raises:
            PlanError: If the file is missing or is not a valid plan.
            IntegrityError: If the file is not valid JSON.
        """
        if not Path(path).is_file():
            raise PlanError(
                f"There is no {cls.title} at {path}.",
                hint="`gradpruner plan` writes plans/<variant>.json into the run directory.",
            )
        return cls.from_dict(read_json(Path(path), cls.title), str(path))

    @classmethod
    def from_dict(cls, raw: Any, where: str = "plan") -> Self:
        """Reads a plan from JSON values, which may have been edited by hand.

        `where` says in messages where the values come from.

        Raises:
            PlanError: If a field is wrong. The message names the field and what is allowed.
        """
        if not isinstance(raw, dict):
            raise PlanError(f"{where} is not a {cls.title}: a JSON object is needed.")
        found = "width" if raw.get("kind") == "width" else "layers"
        if found != cls.kind:
            raise PlanError(
                f"{where} is not a {cls.title}: it is a plan of {_PARTS[found]}, and one of "
                f"{_PARTS[cls.kind]} is needed here.",
                hint="`gradpruner prune MODEL NEW --plan FILE` takes plans of either kind.",
            )
        for key in raw:
            if key not in cls.json_fields:
                raise PlanError(
                    f"{where}: unknown field {shown(key)}.{suggest(key, cls.json_fields)}",
                    hint=f"Allowed: {', '.join(cls.json_fields)}.",
                )
        version, evidence = raw.get("format_version", FORMAT_VERSION), raw.get("evidence", {})
        if version != FORMAT_VERSION:
            raise PlanError(f"{where}: format_version {shown(version)} is not {FORMAT_VERSION}.")
        if not isinstance(evidence, dict):
            raise PlanError(f"{where}: evidence is {shown(evidence)}; a JSON object is needed.")
        try:
            check_json(evidence)
        except ValueError as error:
            raise PlanError(f"{where}: evidence: {error}.", hint="Evidence must be JSON values.") from error
        return cls._read(raw, where)

    @classmethod
    def _read(cls, raw: dict[str, Any], where: str) -> Self:
        """Reads a JSON object whose field names and evidence have been checked."""
        raise NotImplementedError
