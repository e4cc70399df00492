"""Memory: peaks measured and predicted, and what fits."""
