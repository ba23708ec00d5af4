"""What every other package builds on. Imports nothing else from this project.

errors      all errors raised on purpose, with their exit codes
registry    lookup by name, with suggestions for misspelt names
files       atomic writes, locks, and path checks
options     options as objects, checked when they are made
json_files  JSON files, read strictly and by type
printing    numbers as text, and results that print as tables
ranking     layers in order of their scores, and the table of them
progress    progress bars and log lines
memory      the peak memory of a block of code
run_names   names of a run's stages, and of a row's files
version     the version of this package
provenance  commit, packages and machine; hashes of files and values
world       the processes of a distributed job, and how they communicate
"""
