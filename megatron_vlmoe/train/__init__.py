"""The training loop and what it needs: model and optimizer set-up, steps, checkpoints, evaluation, metrics."""
