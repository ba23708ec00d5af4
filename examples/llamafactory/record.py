"""Records gradients for pruning while LLaMA-Factory trains, which it does as without it.

python record.py tune.yaml model_name_or_path=./my-model
python ../plan_trace.py trace plan.json
gradpruner prune ./my-model ./pruned --plan plan.json --trace trace

Instead of `llamafactory-cli train`, with the same arguments; on several GPUs under torchrun.
Needs finetuning_type: lora.
Checked with llamafactory 0.9.5 as tune.yaml says: `run_exp` hands callbacks to the Trainer.
"""

from llamafactory.train.tuner import run_exp

from gradpruner import GradientRecorder

if __name__ == "__main__":
    run_exp(callbacks=[GradientRecorder(steps=40, folder="trace")])
