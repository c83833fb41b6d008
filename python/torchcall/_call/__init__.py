"""One call, from its arguments to its plan."""
