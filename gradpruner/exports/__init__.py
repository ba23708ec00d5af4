"""Exports a finished model to llama.cpp and Ollama, and pushes it to the hub.

shipped    the model to export or push, with adapters merged in; from a run, the one to ship
exporting  writes the GGUF file and the Modelfile
gguf       finds and runs llama.cpp's own converter and quantiser
comparing  whether the GGUF file answers like transformers; engine: llama.cpp in a process of its own
ollama     the Modelfile; turns: a chat template as the texts around its turns
hub        the files to push, with the model card, and the push itself
"""
