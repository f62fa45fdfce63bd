"""Natural-gradient optimizers, one file each."""
