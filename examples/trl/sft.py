"""Tunes a model with LoRA in TRL and saves plain weights; with --record also records gradients for pruning.

Train a pruned model:       python sft.py runs/small/variants/either/pruned train.jsonl tuned
Record while a model tunes: python sft.py ./my-model train.jsonl tuned --record trace
                            python ../plan_trace.py trace plan.json
                            gradpruner prune ./my-model ./pruned --plan plan.json --trace trace

Rows are prompt/completion, or `messages` whose last message is the answer to learn.
Checked with trl 1.16.0, transformers 5.23.0, peft 0.21.2 on a CPU; the test suite runs it.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from gradpruner import GradientRecorder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="model folder or hub id")
parser.add_argument("data", help="training rows, JSONL")
parser.add_argument("out", help="folder for the tuned model")
parser.add_argument("--record", metavar="TRACE", help="new folder for the gradients of the first 40 steps")
parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps instead of three epochs")
options = parser.parse_args()

rows = load_dataset("json", data_files=options.data, split="train")
if "messages" in rows.column_names:
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=rows.column_names,
    )
on_gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    options.model,
    args=SFTConfig(
        output_dir=f"{options.out}-checkpoints",
        num_train_epochs=3,
        max_steps=options.max_steps,
        learning_rate=2e-4,
        save_strategy="no",
        report_to="none",
        bf16=on_gpu,
        use_cpu=not on_gpu,
    ),
    train_dataset=rows,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    callbacks=[GradientRecorder(steps=40, folder=options.record)] if options.record else [],
)
trainer.train()
trainer.model.merge_and_unload().save_pretrained(options.out)
trainer.processing_class.save_pretrained(options.out)
