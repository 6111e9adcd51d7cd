"""Several tokens for each pass over the weights, with the same output."""
