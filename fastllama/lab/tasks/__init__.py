"""Tasks: fixed sets of prompts, each measured as one table with a row per example."""
