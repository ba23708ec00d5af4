"""An ms-swift plugin that records gradients for pruning while ms-swift trains.

swift sft tune.yaml --model ./my-model --external_plugins gradpruner_plugin.py --callbacks gradpruner
python ../plan_trace.py trace plan.json
gradpruner prune ./my-model ./pruned --plan plan.json --trace trace

`--callbacks` names entries of `callbacks_map`. Checked with ms-swift 4.6.0; tune.yaml says how.
"""

from swift.callbacks import callbacks_map

from gradpruner import GradientRecorder

callbacks_map["gradpruner"] = lambda args, trainer: GradientRecorder(steps=40, folder="trace")
