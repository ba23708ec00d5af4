"""Before a run: what it would do, how long it would take, and whether it fits.

preview   the dry run
forecast  about how long a run takes
fitting   whether a run fits into memory
disk      how many bytes a run writes
done      what the run directory holds already
"""
