"""What was recorded, and what it says of layers. Pure torch.

trace         GradientTrace: the LoRA gradients of the first steps, as layer energies and as factors
trace_writer  TraceWriter: collects a trace step by step
importance    element importance (IGIA) of one linear from its factors; energies of whole ones
scores        LayerScores: one number a layer, from energies
gates         the effect of leaving a layer out, per example, and choices that rest on it
"""
