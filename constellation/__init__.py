"""constellation: small language models trained by natural gradients and routed by Fisher-Rao geometry."""

__version__ = "0.1.0"
