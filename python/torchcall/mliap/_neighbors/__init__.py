"""The neighbour list."""
