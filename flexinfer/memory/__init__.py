"""Memory of this process: buffers, the heap, pages of libraries, and what is in use."""
