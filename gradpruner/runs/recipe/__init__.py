"""The recipe: everything a run depends on.

recipe      Recipe, checked as a whole
sections    its sections and their keys
effects     what each key changes
yaml_files  YAML files as plain values
key_hints   suggestions for unknown keys
"""
