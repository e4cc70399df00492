"""Where the time and the memory of a generation go."""
