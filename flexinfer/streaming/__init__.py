"""The way of weights from disk to the modules that use them: readers, the window, locked memory,
the KV cache.
"""
