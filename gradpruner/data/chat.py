"""Renders conversations with the tokenizer's chat template, and finds what is learned and where replies end.

A template is a program that comes with the tokenizer. This module checks what training and generation need:
that it opens a reply where one is generated, writes the start token once, and shows all fields of the rows.
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

_PROBE = "xyzzy"  # a reply whose text does not occur in any template


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[list[int], list[bool], list[int]]:
    """Returns the ids before the last answer, whether each is learned, and the answer's ids with its end.

    Raises:
        DataError: If the tokenizer has no template, or the template refuses the conversation or does not
            open the reply.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{example.id}: the data are conversations, but the tokenizer has no chat template.",
            hint=f"Set data.chat_template to {', '.join(TEMPLATES)} or a Jinja file, or write the rows as "
            "prompt/completion.",
        )
    *earlier, (last, _) = _pieces(tokenizer, example)
    head: list[int] = []
    learned: list[bool] = []
    written, spaced = "", adds_space(tokenizer)
    for text, kept in earlier:
        ids = _ids_behind(tokenizer, written, text)
        end = (_turn_end(tokenizer, ids) or len(ids)) if kept else 0
        head += ids
        learned += [True] * end + [False] * (len(ids) - end)
        written += text if spaced else ""
    answer = _ids_behind(tokenizer, written, last)
    end = _turn_end(tokenizer, answer)
    if end:
        return head, learned, answer[:end]
    # The template does not close its turns: without an end token the model would never stop.
    eos = tokenizer.eos_token_id
    return head, learned, answer if eos is None else [*answer, int(eos)]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text, without start and end tokens."""
    # verbose=False: we cut long texts ourselves, so the tokenizer need not warn about their length.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before a text, as those of Llama 2 and Mistral do."""
    first = tokenizer.convert_ids_to_tokens(text_ids(tokenizer, "a")[:1])
    return bool(first) and str(first[0]).startswith("▁")


def _ids_behind(tokenizer: PreTrainedTokenizerBase, written: str, text: str) -> list[int]:
    """Returns the ids of a text behind another one, without the space that would be put before it alone."""
    if written:
        before, whole = text_ids(tokenizer, written), text_ids(tokenizer, written + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return text_ids(tokenizer, text)


def template_notes(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[str, ...]:
    """Returns notes for the user about what a template changes in these conversations.

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
            "remove one from the template (chat_template.jinja or tokenizer_config.json)"
        )
    return tuple(filter(None, notes))


def _unused_fields(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example]) -> str:
    """Returns a note of fields that the template does not show, with their numbers of rows."""
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
    return f"the chat template does not show these fields, so they have no effect: {named}" if named else ""


def _without(message: Message, name: str) -> Message:
    if not message.extra:
        return message
    kept = {key: value for key, value in json.loads(message.extra).items() if key != name}
    return replace(message, extra=json.dumps(kept) if kept else "")


def _rewritten(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example]) -> str:
    """Returns a note of replies that the template changes."""
    changed = [chat for chat in chats if chat.answer.strip() not in _pieces(tokenizer, chat)[-1][0]]
    if not changed:
        return ""
    shown = _pieces(tokenizer, changed[0])[-1][0].strip()
    return (
        f"the chat template changes {len(changed)} of {len(chats)} replies (first: {changed[0].id}, learned "
        f"as {shown[:60]!r}); write the replies as the template does, or change the template"
    )


def _only_last(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Example]) -> str:
    """Returns a note of conversations in which only the last reply can be learned."""

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
    """Returns the rendered conversation in pieces (text, learned?); the last piece is the answer.

    Every assistant turn can be learned if the template renders turn by turn, that is, if later turns do
    not change how earlier ones are written. With templates that rewrite earlier turns (dropping their
    reasoning, for example), only the last turn can be learned.
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
    # If the written turn does not begin like the generation prompt, the bare answer is used.
    return [(before, False), (answer or example.answer, messages[-1].learned)]


def _check_opening(tokenizer: PreTrainedTokenizerBase, example: Example, before: str) -> None:
    """Refuses a template that has no generation prompt but writes a header before a reply."""
    earlier = example.messages[:-1]
    if before != _render(tokenizer, example, earlier):
        return
    probed = (*earlier, Message("assistant", _PROBE))
    header = _render(tokenizer, example, probed).removeprefix(before).partition(_PROBE)[0].strip()
    if header:
        raise DataError(
            f"{example.id}: the chat template ignores add_generation_prompt: it writes {header!r} before a "
            "reply but has no generation prompt, so the header would be learned as part of the answer.",
            hint="Add to the end of the template: {% if add_generation_prompt %}"
            + header
            + "{% endif %}, with the white space that the template writes around the header.",
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
    except Exception as error:  # templates are programs and may raise any error
        raise DataError(
            f"{example.id}: the tokenizer's chat template refuses this conversation: {error}",
            hint="Many templates want user and assistant to take turns, and some allow no system turn.",
        ) from error
    return str(text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of all special tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """Returns the number of tokens up to and including the one that closes the turn; 0 if none does.

    Templates often write a line break after the closing token; the model need not learn it.
    """
    special = special_ids(tokenizer)
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in special:
            rest = str(tokenizer.decode(list(ids[index + 1 :])))
            return 0 if rest.strip() else index + 1
    return 0
