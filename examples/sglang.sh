#!/bin/bash
# Serves a pruned model with SGLang and asks it one question:  bash sglang.sh runs/small/variants/either/pruned
# Not run by this project, because SGLang needs a GPU. `gradpruner prune` says beforehand whether SGLang runs the model (docs/serving.md).
set -euo pipefail
python -m sglang.launch_server --model-path "$1" --served-model-name pruned --port 30000 &
trap 'kill $!' EXIT
until curl --silent --fail http://localhost:30000/health; do sleep 2; done
curl http://localhost:30000/v1/chat/completions --header 'Content-Type: application/json' \
    --data '{"model": "pruned", "messages": [{"role": "user", "content": "Where is my card?"}], "max_tokens": 32}'
