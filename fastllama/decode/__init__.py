"""The loop around the model: prompt, prefill, step, sample, stop."""
