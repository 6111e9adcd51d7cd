"""The modules of a streamed model: linears, experts and the embedding, which take their rows from
the store.
"""
