"""What a model learns from another one while it is slimmed: the teacher, what it says, and the loss to that.

`SlimTrainerMixin` is the door of any Trainer, `Distiller` what asks and compares behind it.
"""

from .distiller import Distiller
from .fresh_weights import remember_fresh
from .slim_trainer import SlimTrainer, SlimTrainerMixin, refuse_untaught
