"""Corpora: reading, splitting, tokenised caches, batches."""
