"""An OpenAI-compatible server: transformers' own handlers, around a model that streams its weights
inside a memory budget.
"""
