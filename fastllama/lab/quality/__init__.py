"""Quality: what a loss of precision or of context costs."""
