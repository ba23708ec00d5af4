"""Small models, tokenizers and tasks, built in memory."""

import json
import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gradpruner.models.layers import LayeredModel

COLOURS, ANIMALS = ("red", "blue", "green"), ("cat", "dog", "bird")
WORDS = [*COLOURS, *ANIMALS, "is", "the", "a", "what", "colour", "animal", ":", ",", ".", "yes", "no"]
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]


def make_llama(seed=0, **changes):
    """Four layers of width 16, in evaluation mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()


def tiny_config(**changes):
    """Small enough to be counted by hand."""
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**(fields | heads | changes))


def make_qwen2(**changes):
    """Width 16 with biases on q and k."""
    torch.manual_seed(0)
    fields = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"max_position_embeddings": 64, "initializer_range": 0.2}
    model = Qwen2ForCausalLM(Qwen2Config(**(fields | heads | rest | changes))).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
            layer.self_attn.k_proj.bias.normal_()
    return model


def pass_through(model, *layers):
    """Makes layers hand on what they are given, by taking away what they would add."""
    with torch.no_grad():
        for layer in layers:
            for name, weight in LayeredModel(model).weights(layer).items():
                if name.endswith(("o_proj", "down_proj")):
                    weight.zero_()
    return model


def make_tokenizer():
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_samples(count=16, seed=0):
    """Encoded samples of different lengths; the last two tokens are learned."""
    draw = random.Random(seed)
    samples = []
    for _ in range(count):
        prompt = [1, *(draw.randrange(4, len(VOCABULARY)) for _ in range(draw.randint(2, 6)))]
        answer = [draw.randrange(4, len(VOCABULARY)), 2]
        samples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return samples


def make_rows(count, seed=0):
    """Rows of a task: the colour that was named is the answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        colour, animal = draw.choice(COLOURS), draw.choice(ANIMALS)
        prompt = f"the {animal} is {colour} . what colour is the {animal} :"
        rows.append({"prompt": prompt, "completion": f" {colour}"})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_project(folder, **recipe):
    """A model folder, data files and a recipe; returns the recipe's path and its values."""
    folder.mkdir(parents=True, exist_ok=True)
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", make_rows(24))
    write_rows(folder / "eval.jsonl", make_rows(12, seed=1))
    values = {
        "model": {"path": "./model"},
        "data": {"train": "./train.jsonl", "eval": "./eval.jsonl"},
        "record": {"steps": 4, "batch_size": 4, "rank": 2, "alpha": 4},
        "effort": "paper",
        "plan": {"num_prune": 2, "num_merge": 1, "protect_first": 1},
        "finetune": {"batch_size": 4, "accumulation": 1, "epochs": 1, "learning_rate": 1e-3},
        "evaluate": {"batch_size": 12},
        "out": str(folder / "run"),
    }
    for key, value in recipe.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path, values


def nll(model, samples):
    """Nats per learned token, one sample at a time."""
    losses = []
    for sample in samples:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
        labels = torch.tensor(sample["labels"])[1:]
        learned = labels != -100
        losses.append(cross_entropy(logits[:-1][learned], labels[learned], reduction="none"))
    return float(torch.cat(losses).mean())
