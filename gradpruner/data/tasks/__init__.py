"""Named tasks: one file for each family of datasets; adding one is that file and one import line here."""

from gradpruner.data.tasks import (  # noqa: F401
    arc,
    banking77,
    billsum,
    financial_phrasebank,
    fingpt_sentiment,
    gsm8k,
    hellaswag,
    medmcqa,
    mmlu,
    piqa,
    pubmedqa,
    scitldr,
    sst2,
    trec,
    winogrande,
)
from gradpruner.data.tasks.base import TASKS, Task, load_task

__all__ = ["TASKS", "Task", "load_task"]
