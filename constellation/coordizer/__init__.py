"""Text to tokens and back: byte-level BPE, lossless on any bytes."""
