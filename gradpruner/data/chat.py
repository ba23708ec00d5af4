"""Conversations through the tokenizer's chat template: what is read, what is learned, what ends it.

A template is a program that came with the tokenizer. What it must do to be learned from and generated with is
checked here: open the reply where a reply is generated, write the start token once, show what the rows hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradpruner.common.errors import DataError
from gradpruner.data.chat_templates import TEMPLATES
from gradpruner.data.examples import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "xyzzy"  # a reply that no template writes around a reply


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[list[int], list[bool], list[int]]:
    """Returns everything before the last answer, which of it is learned, and the last answer with its end.

    Raises:
        DataError: If the tokenizer has no template, or the template refuses the conversation or does not
            open the reply.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{example.id}: the data are conversations, but the tokenizer has no chat template.",
            hint=f"Name one: data.chat_template: {', '.join(TEMPLATES)}, or a Jinja file. Or write the rows "
            "as prompt/completion.",
        )
    *earlier, (last, _) = _pieces(tokenizer, example)
    head: list[int] = []
    learned: list[bool] = []
    for text, kept in earlier:
        ids = text_ids(tokenizer, text)
        end = (_turn_end(tokenizer, ids) or len(ids)) if kept else 0
        head += ids
        learned += [True] * end + [False] * (len(ids) - end)
    answer = text_ids(tokenizer, last)
    end = _turn_end(tokenizer, answer)
    if end:
        return head, learned, answer[:end]
    # A template that does not close its turns: without an end token the model never stops.
    eos = tokenizer.eos_token_id
    return head, learned, answer if eos is None else [*answer, int(eos)]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text and nothing around them."""
    # verbose=False: a long text is cut by us, so the tokenizer need not warn about its length.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def template_notes(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[str, ...]:
    """Returns what a template does to these conversations that the user should know, in sentences.

    Raises:
        DataError: If the template refuses a conversation or does not open the reply.
    """
    chats = [example for example in examples if example.messages]
    if not chats:
        return ()
    notes = [_unused_fields(tokenizer, chats), _rewritten(tokenizer, chats), _only_last(tokenizer, chats)]
    first = text_ids(tokenizer, _pieces(tokenizer, chats[0])[0][0])[:2]
    if first == [tokenizer.bos_token_id] * 2:
        notes.append(
            f"the chat template writes the start token (BOS, {tokenizer.bos_token}) twice at the beginning; "
            "remove one of them from the template, chat_template.jinja or tokenizer_config.json"
        )
    return tuple(filter(None, notes))


def _unused_fields(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example]) -> str:
    """Names what rows say and the template does not show, with the number of rows."""
    counts: dict[str, int] = {}
    for chat in chats:
        names = {key for message in chat.messages if message.extra for key in json.loads(message.extra)}
        for name in sorted(names):
            without = tuple(_without(message, name) for message in chat.messages)
            if _render(tokenizer, chat, without) == _render(tokenizer, chat, chat.messages):
                counts[name] = counts.get(name, 0) + 1
        if chat.tools:
            bare = replace(chat, tools="")
            if _render(tokenizer, bare, chat.messages) == _render(tokenizer, chat, chat.messages):
                counts["tools"] = counts.get("tools", 0) + 1
    named = ", ".join(f"{name} ({count} rows)" for name, count in counts.items())
    return f"the chat template does not show, so they are not learned from: {named}" if named else ""


def _without(message: Message, name: str) -> Message:
    if not message.extra:
        return message
    kept = {key: value for key, value in json.loads(message.extra).items() if key != name}
    return replace(message, extra=json.dumps(kept) if kept else "")


def _rewritten(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example]) -> str:
    """Counts replies that the template writes otherwise than the row does."""
    changed = [chat for chat in chats if chat.answer.strip() not in _pieces(tokenizer, chat)[-1][0]]
    if not changed:
        return ""
    shown = _pieces(tokenizer, changed[0])[-1][0].strip()
    return (
        f"the chat template writes {len(changed)} of {len(chats)} replies otherwise than the rows do (first: "
        f"{changed[0].id}, learned as {shown[:60]!r}); write the rows as the template does, or change it"
    )


def _only_last(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example]) -> str:
    """Counts conversations of which only the last reply can be learned."""

    def wanted(chat: Example) -> int:
        return sum(message.role == "assistant" and message.learned for message in chat.messages[:-1])

    lost = sum(
        wanted(chat) > sum(learned for _, learned in _pieces(tokenizer, chat)[:-1])
        for chat in chats
        if wanted(chat)
    )
    return (
        f"the chat template rewrites earlier turns: in {lost} conversations only the last reply is learned"
        if lost
        else ""
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[str, bool]]:
    """Returns the rendered conversation in pieces (text, learned?); the last one is the answer.

    Every assistant turn is learned when the template renders turn by turn, so that what was written
    before a turn does not change after it. Templates that rewrite earlier turns (dropping their
    reasoning, for example) leave only the last turn to learn.
    """
    messages = example.messages
    pieces: list[tuple[str, bool]] = []
    written = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(tokenizer, example, messages[:index], generation=True)
        after = _render(tokenizer, example, messages[: index + 1])
        if not before.startswith(written) or not after.startswith(before) or after == before:
            break
        pieces += [(before[len(written) :], False), (after[len(before) :], message.learned)]
        written = after
    else:
        _check_opening(tokenizer, example, before)
        return pieces
    before = _render(tokenizer, example, messages[:-1], generation=True)
    after = _render(tokenizer, example, messages)
    _check_opening(tokenizer, example, before)
    answer = after[len(before) :] if after.startswith(before) else ""
    # Where the prompt for generating is not how the turn is then written, the bare answer follows.
    return [(before, False), (answer or example.answer, messages[-1].learned)]


def _check_opening(tokenizer: PreTrainedTokenizerBase, example: Example, before: str) -> None:
    """Refuses a template that opens no reply where one is generated, yet writes a header before it."""
    earlier = example.messages[:-1]
    if before != _render(tokenizer, example, earlier):
        return
    probed = (*earlier, Message("assistant", _PROBE))
    header = _render(tokenizer, example, probed).removeprefix(before).partition(_PROBE)[0].strip()
    if header:
        raise DataError(
            f"{example.id}: the chat template ignores add_generation_prompt: it writes {header!r} before a "
            "reply, but no generation prompt, so the header would be learned as part of the answer.",
            hint="Add to the end of the template: {% if add_generation_prompt %}"
            + header
            + "{% endif %}, with the white space the template writes around it.",
        )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    messages: Sequence[Message],
    generation: bool = False,
) -> str:
    turns = [message.as_turn() for message in messages]
    tools: dict[str, Any] = {"tools": json.loads(example.tools)} if example.tools else {}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **tools)
    except Exception as error:  # templates are programs and raise what they like
        raise DataError(
            f"{example.id}: the tokenizer's chat template refuses this conversation: {error}",
            hint="Many templates want user and assistant in turn, some no system turn.",
        ) from error
    return str(text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of all tokens that are marks and not text."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """Returns the number of tokens up to and with the one that closes the turn; 0 if none does.

    Templates often write a line break behind the closing token; it is not for the model to say.
    """
    special = special_ids(tokenizer)
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in special:
            behind = str(tokenizer.decode(list(ids[index + 1 :])))
            return 0 if behind.strip() else index + 1
    return 0
