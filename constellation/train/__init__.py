"""Where the parts meet: the training loop, what it goes through, and its checkpoints."""
