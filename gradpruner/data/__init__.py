"""From a file or the hub to token ids.

rows      files and hub datasets as rows
folders   which files of a folder hold a split
parsing   the content of one file as rows
examples  rows as examples: prompt, answer, choices
encoding  examples as token ids and labels
numbers   the number a worked answer ends with
tasks     named tasks, one file each
"""
