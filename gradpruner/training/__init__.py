"""Recording, fine-tuning and distillation, all through the Hugging Face Trainer.

options         options of recording, fine-tuning and distillation; sections of the recipe
trainer         a Trainer that computes logits only for the tokens that are learned
rates           the default learning rate
answer_loss     the mean loss of the learned tokens, measured without training
batching        how the samples of a batch become rows: packed, grouped or padded
callbacks       progress, and a guard against NaN; resume: find the last complete checkpoint
adapters        LoRA and its variants on every linear of every layer
finetuning      finetune: full, LoRA or QLoRA, with or without a teacher; checks: what this machine can do
sharding        weights sharded over processes, and gathered again after training
teacher         the loss of a student, and the Trainer that computes it
distillation    train a student by its teacher alone
recording       GradientRecorder and record_gradients
step_gradients  read gradients right before an optimizer step
"""
