"""Reads rows from files or the hub and turns them into token ids.

examples  an example: prompt, answer, choices, turns; sets of examples
parsing   the content of one file as rows
folders   which files of a folder hold a split
rows      files and hub datasets as rows
shapes    the usual formats: how a row becomes an example
layouts   a user's own columns: other names, templates, texts with a label
advice    what to do about rows that cannot be read
tasks     named tasks, by what they ask for
loading   a user's own file as a set of examples
chat      conversations through a chat template, and checks of the template
chat_templates  templates by name, for tokenizers without one; markers of other models in rows
encoding  examples as token ids and labels
vocabulary  checks that a tokenizer belongs to a model
numbers   the number a worked answer ends with
"""
