"""A whole training step, of one graph or several: the front door, the backend, and planning ahead."""
