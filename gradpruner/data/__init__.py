"""From a file or the hub to token ids.

rows      files and hub datasets as rows
folders   which files of a folder hold a split
parsing   the content of one file as rows
shapes    a row as an example: prompt, answer, choices, turns
layouts   columns of one's own: other names, templates, texts with a label
examples  the usable rows of a file as examples
chat      conversations through a chat template, and what a template must do
chat_templates  templates by name, for tokenizers without one; markers of other models in rows
encoding  examples as token ids and labels
vocabulary  whether a tokenizer belongs to a model
numbers   the number a worked answer ends with
tasks     named tasks, one file each
"""
