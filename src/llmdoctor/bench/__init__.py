"""The arena: every method on the same patient, pairs and prompts, and the tables made of it."""
