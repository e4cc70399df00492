"""Sampling options, in llama.cpp's order and in transformers', for generate and as a logits processor."""
