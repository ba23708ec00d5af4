#!/bin/bash
# Serves a pruned model with vLLM and asks it one question:  bash vllm.sh runs/small/variants/either/pruned
# Not run by this project, because vLLM needs a GPU. `gradpruner prune` says beforehand whether vLLM runs the model (docs/serving.md).
set -euo pipefail
vllm serve "$1" --served-model-name pruned --port 8000 &
trap 'kill $!' EXIT
until curl --silent --fail http://localhost:8000/health; do sleep 2; done
curl http://localhost:8000/v1/chat/completions --header 'Content-Type: application/json' \
    --data '{"model": "pruned", "messages": [{"role": "user", "content": "Where is my card?"}], "max_tokens": 32}'
