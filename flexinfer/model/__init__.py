"""The empty model: what transformers builds without weights, and where each weight lies."""
