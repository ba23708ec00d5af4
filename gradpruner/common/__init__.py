"""What every package stands on; imports nothing else of this project.

errors      everything raised on purpose, with its exit code; registry: names under which things are found
files       files that are never half written, locks, paths that stay inside; json_files: JSON read by type
printing    numbers in words, results that print as tables; progress: bars and lines
provenance  commit, packages and machine; hashes
world       the processes of a job, and what they tell one another
"""
