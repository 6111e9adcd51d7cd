"""Checkpoints: where each tensor lies, what model they belong to, and copies in fewer bits."""
