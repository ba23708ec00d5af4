"""A finished model on its way out: to llama.cpp and Ollama, and to the hub.

shipped    the model that is exported or pushed: of a run the one to ship, adapters merged in
gguf       llama.cpp's own converter and quantiser, found and run
comparing  whether the GGUF answers as transformers does; engine: llama.cpp in a process of its own
ollama     the Modelfile; turns: a chat template as the texts around its turns
hub        what is pushed, with the card it gets, and the pushing
"""
