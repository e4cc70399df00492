"""Many prompts on one cache: a finished row's place is taken by the next prompt at once."""
