"""Models and model folders: checked, loaded, measured, narrowed and saved.

families       how each model type keeps its layers: one row per type
config_patch   the config of a model with fewer layers
layers         LayeredModel: the decoder layers of a causal LM, in order, and their linears
restoring      changes for the length of a block: modes and forwards of modules
proof          whether two models compute the same
walking        Walk: runs layers one by one on hidden states
widths         WidthView: the heads, channels and hidden dimensions of a model
narrowing      makes a model narrower in memory, and classes for layers of different widths
sizes          parameters, operations, bytes
engines        what vLLM, SGLang and llama.cpp assume about layers; engine_widths: about widths
folder         finds model folders and writes ours; card: the model card in them
checking       whether a folder can be used at all; raw_config: what its config.json says about that
classes        the transformers class for a config
dtypes         the dtype a checkpoint is stored in, read from its tensors
shards         the weights of a folder, from untrusted safetensors headers (headers) and indexes
kernels        faster matrix products on CPUs, where they are exact
loading        loads models from folders; saving: saves them
"""
