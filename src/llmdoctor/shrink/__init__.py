"""A small model out of a large one: some of its layers, distilled on its own answers."""
