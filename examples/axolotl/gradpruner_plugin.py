"""An axolotl plugin that records gradients for pruning while axolotl trains; see record.yaml.

Checked with axolotl 0.19.0 as record.yaml says: what `add_callbacks_post_trainer` returns is added to
the Trainer.
"""

from axolotl.integrations.base import BasePlugin

from gradpruner import GradientRecorder


class RecordGradients(BasePlugin):
    """Records the gradients of the first 40 steps into the folder `trace`."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        """The recorder, for the Trainer."""
        return [GradientRecorder(steps=40, folder="trace")]
