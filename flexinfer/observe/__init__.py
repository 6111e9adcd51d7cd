"""What a run did: counters, timelines, and what they mean."""
