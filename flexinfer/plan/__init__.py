"""Where a memory budget goes. Pure functions: no files, no clock, no torch."""
