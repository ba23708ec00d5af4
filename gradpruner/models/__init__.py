"""All that knows a model or its folder.

families       how every model type keeps its layers: one row a type
config_patch   the config of a model with fewer layers
layers         LayeredModel: a causal LM as its ordered decoder layers and their linears
proof          whether two models compute the same
walking        Walk: layers run one by one on hidden states
widths         WidthView: heads, channels and hidden dimensions of a model
narrowing      a model made narrower in memory, and classes for layers of different widths
sizes          parameters, operations, bytes; memory: the peak of a block of code
engines        what vLLM, SGLang and llama.cpp assume of layers; engine_widths: of widths
folder         model folders: where they are, what we leave in ours; card: the model card in them
checking       whether a folder can be used at all; raw_config: by what its config.json says
classes        which class of transformers a config means
dtypes         in which dtype a checkpoint is stored, by its tensors
shards         safetensors headers and indexes, read with distrust
loading        models from folders; saving: and back
"""
