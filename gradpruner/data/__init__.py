"""From a file or the hub to token ids.

examples  what is learned and asked: prompt, answer, choices, turns
parsing   the content of one file as rows
folders   which files of a folder hold a split
rows      files and hub datasets as rows
shapes    a row as an example, in the usual formats
layouts   columns of one's own: other names, templates, texts with a label
tasks     named tasks, by what they ask for
loading   a user's own file as a set of examples
chat      conversations through a chat template, and what a template must do
chat_templates  templates by name, for tokenizers without one; markers of other models in rows
encoding  examples as token ids and labels
vocabulary  whether a tokenizer belongs to a model
numbers   the number a worked answer ends with
"""
