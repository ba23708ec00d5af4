"""One row of the comparison: the dense model, or the model that one method leaves.

planning      its plan
variant       its folders, and what its stages depend on
stages        its stages, in order
work          what each stage does
depth_search  how many layers may go, for plan.max_loss
held_out      decisions by the loss on held-out rows
rate_search   the search for the learning rate
together      work that all processes of a job do at once
"""
