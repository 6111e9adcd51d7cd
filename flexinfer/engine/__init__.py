"""Loading a model, and running passes over its weights inside the budget."""
