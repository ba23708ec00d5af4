"""Layer scores from the first steps of a TRL run: `python trl_sft.py MODEL DATA.jsonl`."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from gradpruner import GradientRecorder, plan_pruning, score_layers

model, data = sys.argv[1:3]
on_gpu = torch.cuda.is_available()
recorder = GradientRecorder(steps=40, stop_training=True)  # False (the default) lets the training go on
trainer = SFTTrainer(
    model,
    args=SFTConfig(output_dir="sft", max_steps=40, save_strategy="no", bf16=on_gpu, use_cpu=not on_gpu),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(target_modules="all-linear"),
    callbacks=[recorder],
)
trainer.train()
print(plan_pruning(score_layers(recorder.trace)).save("plan.json"))
