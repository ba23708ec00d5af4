"""Banking77: what does a customer of a bank want? (77 intents)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, label_of, refusal, spaced, text_of

# The hub's order. Two names lose what is a slip there: the capital of "Refund_not_showing_up" and the mark
# of "reverted_card_payment?".
LABELS = (
    "activate my card",
    "age limit",
    "apple pay or google pay",
    "atm support",
    "automatic top up",
    "balance not updated after bank transfer",
    "balance not updated after cheque or cash deposit",
    "beneficiary not allowed",
    "cancel transfer",
    "card about to expire",
    "card acceptance",
    "card arrival",
    "card delivery estimate",
    "card linking",
    "card not working",
    "card payment fee charged",
    "card payment not recognised",
    "card payment wrong exchange rate",
    "card swallowed",
    "cash withdrawal charge",
    "cash withdrawal not recognised",
    "change pin",
    "compromised card",
    "contactless not working",
    "country support",
    "declined card payment",
    "declined cash withdrawal",
    "declined transfer",
    "direct debit payment not recognised",
    "disposable card limits",
    "edit personal details",
    "exchange charge",
    "exchange rate",
    "exchange via app",
    "extra charge on statement",
    "failed transfer",
    "fiat currency support",
    "get disposable virtual card",
    "get physical card",
    "getting spare card",
    "getting virtual card",
    "lost or stolen card",
    "lost or stolen phone",
    "order physical card",
    "passcode forgotten",
    "pending card payment",
    "pending cash withdrawal",
    "pending top up",
    "pending transfer",
    "pin blocked",
    "receiving money",
    "refund not showing up",
    "request refund",
    "reverted card payment",
    "supported cards and currencies",
    "terminate account",
    "top up by bank transfer charge",
    "top up by card charge",
    "top up by cash or cheque",
    "top up failed",
    "top up limits",
    "top up reverted",
    "topping up by card",
    "transaction charged twice",
    "transfer fee charged",
    "transfer into account",
    "transfer not received by recipient",
    "transfer timing",
    "unable to verify identity",
    "verify my identity",
    "verify source of funds",
    "verify top up",
    "virtual card not working",
    "visa or mastercard",
    "why verify identity",
    "wrong amount of cash received",
    "wrong exchange rate for cash withdrawal",
)


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # The intents are not listed: 77 of them would make a prompt of 20 tokens more than ten times as long.
    prompt = f"Customer message: {text_of(row, 'text', row_id)}\nIntent:"
    return Example(row_id, prompt, spaced(_intent(row, row_id)), tuple(map(spaced, LABELS)))


def _intent(row: Mapping[str, Any], row_id: str) -> str:
    """The name of the row's intent; a name in `label_text` goes before the number.

    Copies of the set number the intents differently: sorted by code point, "Refund_not_showing_up" comes
    first and shifts 51 others. Those copies carry the name as well.
    """
    numbered = label_of(row, "label", LABELS, row_id)
    if row.get("label_text") is None:
        return numbered
    name = text_of(row, "label_text", row_id).replace("_", " ").rstrip("?").casefold()
    if name not in LABELS:
        raise refusal(row, "label_text", row_id, "the name of one of the 77 intents, such as card_arrival")
    return name


TASKS.register("banking77")(
    Task(
        name="banking77",
        version=1,
        description="Banking77: what a customer of a bank wants, 77 intents.",
        columns=("text", "label"),
        build=_example,
        hub_id="PolyAI/banking77",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={"train": "default/train/*.parquet", "test": "default/test/*.parquet"},
        # The likelihood of 77 options takes almost five times as long as the greedy answer.
        metric="exact_match",
    )
)
