"""Copies of a checkpoint in fewer bits."""
