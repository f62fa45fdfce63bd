"""Where the parts meet: the training loop and its checkpoints."""
