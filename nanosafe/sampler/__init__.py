"""Prompts in, completions out. `generate` is in generation.py: were it here, the chat's --help would load PyTorch."""
