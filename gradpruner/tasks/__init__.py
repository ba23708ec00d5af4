"""Named tasks: one file each; adding one is that file and one import line here."""

from gradpruner.tasks import financial_phrasebank, fingpt_sentiment, trec  # noqa: F401
from gradpruner.tasks.base import TASKS, Task, load_task

__all__ = ["TASKS", "Task", "load_task"]
