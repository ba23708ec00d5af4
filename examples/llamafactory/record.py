"""Records gradients for pruning while LLaMA-Factory trains; training itself is not changed.

python record.py tune.yaml model_name_or_path=./my-model
python ../plan_trace.py trace plan.json
gradpruner prune ./my-model ./pruned --plan plan.json --trace trace

Takes the place and the arguments of `llamafactory-cli train`; on several GPUs, start it with torchrun. Needs
finetuning_type: lora. `run_exp` passes callbacks to the Trainer. Checked with llamafactory 0.9.5; tune.yaml
says how.
"""

from llamafactory.train.tuner import run_exp

from gradpruner import GradientRecorder

if __name__ == "__main__":
    run_exp(callbacks=[GradientRecorder(steps=40, folder="trace")])
