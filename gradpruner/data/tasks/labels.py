"""Tasks that ask for a class: sentiment, kind of question, a customer's intent."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradpruner.common.errors import DataError
from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import (
    CONVERTED,
    Build,
    Row,
    Task,
    add,
    filled,
    label_of,
    refusal,
    spaced,
    text_of,
)

# In the hub's order: ABBR, ENTY, DESC, HUM, LOC, NUM. Written out in lower case, because the short
# names are split into tokens that no model has read in a sentence.
QUESTIONS = ("abbreviation", "entity", "description", "human", "location", "numeric")
# In the hub's order. Two slips of the hub's names are corrected: the capital of "Refund_not_showing_up" and
# the question mark of "reverted_card_payment?".
_INTENTS = """activate my card, age limit, apple pay or google pay, atm support, automatic top up,
balance not updated after bank transfer, balance not updated after cheque or cash deposit,
beneficiary not allowed, cancel transfer, card about to expire, card acceptance, card arrival,
card delivery estimate, card linking, card not working, card payment fee charged,
card payment not recognised, card payment wrong exchange rate, card swallowed,
cash withdrawal charge, cash withdrawal not recognised, change pin, compromised card,
contactless not working, country support, declined card payment, declined cash withdrawal,
declined transfer, direct debit payment not recognised, disposable card limits,
edit personal details, exchange charge, exchange rate, exchange via app, extra charge on statement,
failed transfer, fiat currency support, get disposable virtual card, get physical card,
getting spare card, getting virtual card, lost or stolen card, lost or stolen phone,
order physical card, passcode forgotten, pending card payment, pending cash withdrawal,
pending top up, pending transfer, pin blocked, receiving money, refund not showing up,
request refund, reverted card payment, supported cards and currencies, terminate account,
top up by bank transfer charge, top up by card charge, top up by cash or cheque, top up failed,
top up limits, top up reverted, topping up by card, transaction charged twice,
transfer fee charged, transfer into account, transfer not received by recipient, transfer timing,
unable to verify identity, verify my identity, verify source of funds, verify top up,
virtual card not working, visa or mastercard, why verify identity, wrong amount of cash received,
wrong exchange rate for cash withdrawal"""
INTENTS = tuple(" ".join(_INTENTS.split()).split(", "))


def classified(prompt: str, column: str, names: Sequence[str]) -> Build:
    """Returns a function that makes examples whose answer is the name of the class number in `column`.

    Args:
        prompt: Text with columns in braces. "<names>" is replaced by the list of names, so that an
            instruction-tuned model can answer before any training.
        column: Column of the class number, from 0.
        names: Names of the classes, in the order of their numbers.
    """
    choices = tuple(map(spaced, names))
    listed = prompt.replace("<names>", ", ".join(names))

    def build(row: Row, row_id: str) -> Example:
        asked = filled(listed, row, row_id)
        return Example(row_id, asked, spaced(label_of(row, column, names, row_id)), choices)

    return build


def _banking77(row: Row, row_id: str) -> Example:
    # The intents are not listed: 77 names would make a prompt of 20 tokens more than ten times as long.
    asked = filled("Customer message: {text}\nIntent:", row, row_id)
    return Example(row_id, asked, spaced(_intent(row, row_id)), tuple(map(spaced, INTENTS)))


def _intent(row: Row, row_id: str) -> str:
    """Returns the name of the row's intent; a name in `label_text` takes precedence over the number.

    Some copies of the dataset number the intents differently: sorted by code point, "Refund_not_showing_up"
    comes first and shifts 51 others. These copies have the names too.
    """
    numbered = label_of(row, "label", INTENTS, row_id)
    if row.get("label_text") is None:
        return numbered
    name = text_of(row, "label_text", row_id).replace("_", " ").rstrip("?").casefold()
    if name not in INTENTS:
        raise refusal(row, "label_text", row_id, "the names of the 77 intents, for example card_arrival")
    return name


def _fingpt(row: Row, row_id: str) -> Example:
    # The dataset's own instruction is kept: it differs by source and names the choices.
    instruction = text_of(row, "instruction", row_id)
    listed = re.search(r"\{([^{}]+)\}", instruction)
    if not listed:
        raise DataError(
            f"{row_id}: the instruction lists no choices: {instruction!r}.",
            hint="It must list the choices in braces: {negative/neutral/positive}.",
        )
    choices = tuple(choice.strip() for choice in listed[1].split("/"))
    answer = text_of(row, "output", row_id)
    if answer not in choices:
        raise refusal(row, "output", row_id, ", ".join(choices))
    asked = filled("Instruction: {instruction}\nInput: {input}\nAnswer:", row, row_id)
    return Example(row_id, asked, spaced(answer), tuple(map(spaced, choices)))


add(
    Task(
        name="sst2",
        description="SST-2: sentiment of sentences from film reviews, two classes.",
        columns=("sentence", "label"),
        build=classified(
            "What is the sentiment of this sentence: <names>?\nSentence: {sentence}\nAnswer:",
            "label",
            ("negative", "positive"),  # the hub's order
        ),
        hub_id="stanfordnlp/sst2",
        eval_split="validation",  # the hub's test split has no answers
    ),
    Task(
        name="financial_phrasebank",
        description="Financial PhraseBank (half the annotators agree): sentiment, three classes.",
        columns=("sentence", "label"),
        build=classified(
            # The annotators of the dataset were asked to judge "for an investor".
            "What is the sentiment of this sentence for an investor: <names>?\nSentence: {sentence}\nAnswer:",
            "label",
            ("negative", "neutral", "positive"),  # the hub's order
        ),
        hub_id="takala/financial_phrasebank",
        hub_revision=CONVERTED,
        hub_files={"train": "sentences_50agree/train/*.parquet"},
        hold_out=1000,
    ),
    Task(
        name="trec",
        description="TREC: what kind of thing a question asks for, six classes.",
        columns=("text", "coarse_label"),
        build=classified(
            "Classify the question by what it asks for: <names>.\nQuestion: {text}\nAnswer:",
            "coarse_label",
            QUESTIONS,
        ),
        hub_id="CogComp/trec",
        hub_revision=CONVERTED,
        hub_files={"train": "default/train/*.parquet", "test": "default/test/*.parquet"},
    ),
    Task(
        name="banking77",
        description="Banking77: what a customer of a bank wants, 77 intents.",
        columns=("text", "label"),
        build=_banking77,
        hub_id="PolyAI/banking77",
        hub_revision=CONVERTED,
        hub_files={"train": "default/train/*.parquet", "test": "default/test/*.parquet"},
        # The likelihoods of 77 options take almost five times as long as the greedy answer.
        metric="exact_match",
    ),
    Task(
        name="fingpt_sentiment",
        description="FinGPT: sentiment of financial news and tweets, three or seven classes.",
        columns=("instruction", "input", "output"),
        build=_fingpt,
        hub_id="FinGPT/fingpt-sentiment-train",
        # The hub has one split, with some sources repeated many times over.
        hold_out=1500,
        # The paper's metric, which finds "mildly positive" close to "positive". The answers are class names,
        # so exact match and the likelihoods of the choices can be measured too.
        metric="similarity",
        train_limit=40_000,
        paper="Tables 1, 3, 4, 7",
    ),
)
