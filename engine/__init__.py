"""What the commands share: data, training, checkpoints, LoRA, evaluation."""

__version__ = "0.1.0"
