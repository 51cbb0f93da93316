"""What the commands share: data, training, checkpoints, LoRA, evaluation."""
