"""Runs llama.cpp in a process of its own, because it may abort its process.

`python -m gradpruner.exports.engine` reads a job (JSON) from standard input and writes the answer (JSON) to
the file that the job names. Needs xllamacpp.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Returns how the file tokenises the job's texts, and its greedy answers to the job's prompts."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["gguf"]
    longest = max(map(len, job["prompts"])) + job["new"] + 8
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = longest, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as reply:  # the server runs in this process
            return json.load(reply)

    greedy = {"n_predict": job["new"], "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return {
        "version": str(xllamacpp.__version__),
        "tokenised": [post("/tokenize", {"content": t, "add_special": True})["tokens"] for t in job["texts"]],
        "tokens": [post("/completion", {"prompt": ids, **greedy})["tokens"] for ids in job["prompts"]],
    }


def main() -> None:
    """Runs one job."""
    job = json.load(sys.stdin)
    Path(job["answer"]).write_text(json.dumps(answers(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
