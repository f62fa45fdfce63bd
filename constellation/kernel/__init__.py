"""The causal language model, its cached decoding and its sampler."""
