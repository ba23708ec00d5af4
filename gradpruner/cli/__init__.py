"""The command line: one file per group of commands. Heavy imports happen inside the commands.

main         the app; the stage commands, report, doctor, schema
options      options that several commands share
executing    resolves and runs a recipe; bundled: the built-in recipes and studies
messages     prints results, errors and interruptions; suggestions: the "next:" lines
init         init
listing      ls
models       prune, verify, diff, rebuild
shrink       shrink
evaluate     evaluate
studies      compare, ablate
cost         cost
export       export, push
serve        serve
doctor       the checks of doctor
"""
