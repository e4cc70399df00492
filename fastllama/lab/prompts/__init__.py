"""Many prompts: files of them, files of results, and requests in parallel."""
