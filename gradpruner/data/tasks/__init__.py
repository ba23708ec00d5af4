"""Named tasks, by what they ask for; adding one is a row in one of these files.

base     what a task is, and reading its rows
labels   a class: sentiment, kind of question, intent
choices  the right one of several options
texts    a text: a summary, a conclusion, a worked sum
"""

from gradpruner.data.tasks import choices, labels, texts  # noqa: F401
from gradpruner.data.tasks.base import TASKS, Task, load_task

__all__ = ["TASKS", "Task", "load_task"]
