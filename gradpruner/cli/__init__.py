"""The command line: one file per group of commands, everything heavy imported inside.

main      the app, the stage commands, report; options: what several commands are told alike
executing what commands share: carrying out a recipe; bundled: recipes and studies that come along
messages  results, errors and interruptions on the terminal; suggestions: what to do next
init      init
listing   ls
models    prune, verify, diff, rebuild
shrink    shrink
evaluate  evaluate
studies   compare, ablate
cost      cost
export    export, push
serve     serve
doctor    what is missing here
"""
