"""Through the Trainer: recording, fine-tuning, distillation.

options         options of recording, fine-tuning and distillation; sections of the recipe
trainer         a Trainer that computes only the logits that are learned from
rates           the default learning rate
batching        layouts of a batch: packed, grouped, padded
callbacks       progress, and a guard against NaN; resume: the last complete checkpoint
adapters        LoRA and its kin on every linear of every layer
finetuning      finetune: full, LoRA or QLoRA, with a teacher or without; checks: what this machine cannot do
sharding        weights spread over processes, and whole again
teacher         the loss of a student, and the Trainer that computes it
distillation    a student trained by its teacher alone
recording       GradientRecorder and record_gradients
step_gradients  gradients as the optimizer is about to see them
"""
