"""The model: a causal language model with QFI-metric attention, its loss, its export."""
