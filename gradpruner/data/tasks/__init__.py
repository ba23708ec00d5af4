"""Named tasks, by what they ask for. To add a task, add an entry to one of these files.

base     what a task is, and reading its rows
labels   tasks that ask for a class: sentiment, kind of question, intent
choices  tasks that ask for one of several options
texts    tasks that ask for a text: a summary, a conclusion, a worked answer
"""

from gradpruner.data.tasks import choices, labels, texts  # noqa: F401
from gradpruner.data.tasks.base import TASKS, Task, load_task

__all__ = ["TASKS", "Task", "load_task"]
