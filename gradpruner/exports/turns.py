"""Derives the texts around the turns of a chat template by rendering it, and proves them the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
# Words that no template writes or changes, so the text around them is the template's.
_SYSTEM, _USER, _ANSWER, _NEXT = "qzsysqz", "qzuserqz", "qzanswerqz", "qznextqz"


@dataclass(frozen=True)
class Turns:
    """The texts around the content of each turn.

    Attributes:
        start: The start token, if the template writes one.
        default: The beginning of a conversation without a system message.
        system: The texts around a system message; None if it has no turn of its own.
        joint: The text between a system message and the first user message, if both share a turn; else None.
        user: The texts around a user message.
        assistant: The texts around an answer.
        reply: The text that opens the answer to be generated.
    """

    start: str
    default: str
    system: tuple[str, str] | None
    joint: str | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str

    def render(self, messages: Sequence[Message]) -> str:
        """Returns a conversation as text, up to the place where the answer begins."""
        first = messages[0]
        system = first["content"] if first["role"] == "system" else None
        text = self.start + (self.default if system is None or self.system is None else "")
        for number, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "system":
                text += f"{self.system[0]}{content}{self.system[1]}" if self.system else ""
                continue
            before, after = self.user if message["role"] == "user" else self.assistant
            joined = (
                f"{system}{self.joint}"
                if number == 1 and system is not None and self.joint is not None
                else ""
            )
            text += f"{before}{joined}{content}{after}"
        return text + self.reply

    def go_template(self, start_is_added: bool) -> str:
        """Returns the turns as a template for Go's text/template, over Ollama's Messages.

        With `start_is_added`, the template leaves out the start token because the engine adds it.
        """
        user, answer = ([_escaped(text) for text in pair] for pair in (self.user, self.assistant))
        joined = ""
        if self.joint is not None:
            joined = "{{ if and $.System (eq $i 1) }}{{ $.System }}" + _escaped(self.joint) + "{{ end }}"
        branches = [("user", f"{user[0]}{joined}{{{{ .Content }}}}{user[1]}")]
        if self.system is not None:
            before, after = map(_escaped, self.system)
            branches.insert(0, ("system", f"{before}{{{{ .Content }}}}{after}"))
        branches.append(("assistant", f"{answer[0]}{{{{ .Content }}}}{answer[1]}"))
        loop = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in branches)
        default = _escaped(self.default)
        if default and self.system is not None:
            default = "{{ if not .System }}" + default + "{{ end }}"
        start = "" if start_is_added else _escaped(self.start)
        body = "{{ range $i, $message := .Messages }}{{ " + loop + "{{ end }}{{ end }}"
        return f"{start}{default}{body}{_escaped(self.reply)}"


def find_turns(tokenizer: Any) -> Turns | str:
    """Returns the turns of a tokenizer's chat template, or in words why it cannot be written as turns."""

    def render(*messages: Message, opened: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
        )

    try:
        found = _guess(render, tokenizer.bos_token or "")
    except Exception as error:  # a template is a program and may raise anything
        return f"it does not write one turn after the other ({str(error).splitlines()[0][:120]})"
    for messages in _probes(found):
        try:
            right = render(*messages, opened=True)
        except Exception as error:
            return f"it refuses a conversation ({str(error).splitlines()[0][:120]})"
        if right != found.render(messages):
            return "it writes a turn differently depending on the turns around it"
    return found


def _guess(render: Any, bos: str) -> Turns:
    """Derives the turns from a few rendered conversations."""
    user, answer = _says("user", _USER), _says("assistant", _ANSWER)
    head, tail = _around(render(user), _USER)
    reply = _without(render(user, opened=True), f"{head}{_USER}{tail}", "")
    between, end = _around(render(user, answer).partition(_USER)[2], _ANSWER)
    opening = _without(between, tail, "")
    following = render(user, answer, _says("user", _NEXT)).partition(_ANSWER)[2]
    begin = _without(_around(following, _NEXT)[0], end, "")
    head = _without(head, "", begin)
    start = bos if bos and head.startswith(bos) else ""
    try:
        before, middle = _around(render(_says("system", _SYSTEM), user).partition(_USER)[0], _SYSTEM)
    except Exception:  # templates without system messages refuse them
        before, middle = "", ""
    system, joint = None, None
    if before.endswith(begin) and before == f"{head}{begin}":
        joint = middle
    elif middle.endswith(begin):
        system = _without(before, start, ""), _without(middle, "", begin)
    return Turns(start, head.removeprefix(start), system, joint, (begin, tail), (opening, end), reply)


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _around(text: str, word: str) -> tuple[str, str]:
    before, found, after = text.partition(word)
    if not found:
        raise ValueError("a message is left out")
    return before, after


def _without(text: str, start: str, end: str) -> str:
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        raise ValueError("turns depend on each other")
    return text[len(start) : len(text) - len(end)]


def _probes(turns: Turns) -> list[list[Message]]:
    """Returns conversations with ordinary contents that the turns must render like the template."""
    user, answer, further = (
        _says("user", "What is 2 + 2?"),
        _says("assistant", "Four."),
        _says("user", "And 3?"),
    )
    found = [[user], [user, answer, further], [user, answer, further, answer, user]]
    if turns.system is not None or turns.joint is not None:
        system = _says("system", "Be brief.\nBe right.")
        found += [[system, user], [system, user, answer, further]]
    return found


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
