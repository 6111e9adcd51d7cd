"""The harness that compares systems: limits, baselines, cells and records. The engine never imports it."""
