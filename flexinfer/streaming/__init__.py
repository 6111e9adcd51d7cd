"""The way of a weight from disk to its product: memory, readers, window, linears, KV cache."""
