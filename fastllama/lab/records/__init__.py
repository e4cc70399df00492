"""Records: what is kept, in which form, and what is rendered from it."""
