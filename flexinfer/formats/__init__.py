"""Checkpoints: where each tensor lies, what model they belong to, and the tokenizer beside them."""
