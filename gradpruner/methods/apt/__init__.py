"""APT-like pruning.

apt            the method: prunes and grows while adapters train
growing_ranks  LoRA adapters whose ranks grow during training
salience       masks on heads and channels, and how much each unit matters
"""
