"""Runs llama.cpp's converter and engine for `gguf.py` and `gguf_widths.py`, in a separate interpreter.

python benchmarks/llama_worker.py CONVERTER     reads jobs as lines of JSON, see `work`
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
import urllib.request
from pathlib import Path
from typing import Any


def work(converter: str) -> None:
    """Reads jobs as lines of JSON and runs each in a fork, because llama.cpp may abort the process."""
    sys.path[:0] = [converter, f"{converter}/gguf-py"]
    import transformers  # imported once here, for all forks
    import xllamacpp
    from conversion import base  # noqa: F401

    versions = {"xllamacpp": xllamacpp.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                globals()[job["do"]](converter, job)
                status = 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(json.dumps({"status": os.waitpid(child, 0)[1]}), flush=True)


def tokenizers(converter: str, job: dict[str, Any]) -> None:
    """Writes three tokenizers: GPT-2's, a small SentencePiece one, and a BPE with byte fallback (gemma4)."""
    import gguf
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder, text = Path(job["folder"]), job["text"]
    fields = gguf.GGUFReader(f"{converter}/models/ggml-vocab-gpt-2.gguf").fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    gpt2 = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=gpt2, bos_token=end, eos_token=end)
    wrapped.add_special_tokens({"additional_special_tokens": ["<|user|>"]})  # glm requires it
    wrapped.save_pretrained(folder / "bpe")

    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    (folder / "spm").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=text, model_prefix=str(folder / "spm" / "tokenizer"), vocab_size=job["vocab"], model_type="bpe",
        byte_fallback=True, minloglevel=2, **special,
    )  # fmt: skip
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    small = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    small.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    small.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=job["vocab"], special_tokens=names, max_token_length=8)
    small.train_from_iterator(Path(text).read_text(encoding="utf-8").splitlines(), trainer)
    bytes_too = PreTrainedTokenizerFast(
        tokenizer_object=small, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    bytes_too.save_pretrained(folder / "pieces")


def convert(converter: str, job: dict[str, Any]) -> None:
    """Runs convert_hf_to_gguf.py; with `pre`, an unknown tokenizer is treated as one of that kind."""
    if job["pre"]:
        from conversion.base import TextModel

        TextModel.get_vocab_base_pre = lambda self, tokenizer: job["pre"]
    script = f"{converter}/convert_hf_to_gguf.py"
    sys.argv = [script, job["model"], "--outfile", job["gguf"], "--outtype", job["outtype"], *job["options"]]
    runpy.run_path(script, run_name="__main__")


def generate(converter: str, job: dict[str, Any]) -> None:
    """Generates greedily with llama.cpp's server; writes tokens and log-probabilities of the vocabulary."""
    import numpy
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["gguf"]
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 512, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if job["exact"]:  # the default is a cache in half precision
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    # The server leaves out tokens that end inside a character. For prompts of token ids it must not matter
    # which token is generated, so a harmless one is forced.
    harmless = post("/tokenize", {"content": "a"})["tokens"][-1]
    answer: dict[str, Any] = {"prompts": [], "tokens": []}
    arrays = {}
    for number, prompt in enumerate(job["prompts"]):
        options = {"temperature": 0, "logprobs": job["vocab"], "max_tokens": job["new"]}
        if isinstance(prompt, str):
            prompt = post("/tokenize", {"content": prompt, "add_special": True})["tokens"]
        else:
            options |= {"max_tokens": 1, "logit_bias": [[harmless, 1e6]]}  # log-probabilities ignore the bias
        reply = server.handle_completions({"prompt": prompt, **options})
        steps = reply["choices"][0]["logprobs"]["content"]
        table = numpy.full((len(steps), job["vocab"]), numpy.nan, numpy.float32)
        for row, step in zip(table, steps, strict=True):
            best = step["top_logprobs"]
            row[[entry["id"] for entry in best]] = [entry["logprob"] for entry in best]
        answer["prompts"].append(prompt)
        answer["tokens"].append([step["id"] for step in steps])
        arrays[f"prompt{number}"] = table
    numpy.savez(job["arrays"], **arrays)
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    # `import gguf` means the library, not the benchmark beside this file.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    work(sys.argv[1])
