"""The recorded gradients, and the layer scores computed from them. Pure torch.

trace         GradientTrace: the LoRA gradients of the first steps, as layer energies and as factors
trace_writer  TraceWriter: records a trace step by step
importance    importance of every entry of a linear (IGIA), and the energy of a whole linear, from its factors
scores        LayerScores: one number per layer, computed from energies
gates         the effect of leaving out a layer on each example's loss, and choices of layers based on it
"""
