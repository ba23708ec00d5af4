"""An axolotl plugin that records gradients for pruning while axolotl trains; see record.yaml.

axolotl adds the callbacks that `add_callbacks_post_trainer` returns to its Trainer. Checked with axolotl
0.19.0; record.yaml says how.
"""

from axolotl.integrations.base import BasePlugin

from gradpruner import GradientRecorder


class RecordGradients(BasePlugin):
    """Records the gradients of the first 40 steps into the folder `trace`."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        """Returns the recorder for the Trainer."""
        return [GradientRecorder(steps=40, folder="trace")]
