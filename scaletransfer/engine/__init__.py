"""What runs a model: engines and their verification, the step, checkpoints, the training loop."""
