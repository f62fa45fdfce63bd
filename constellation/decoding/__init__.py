"""From a trained kernel to tokens: continuous batching, cached forward passes (C, torch, CUDA graph), sampling."""
