"""How noisy the gradients of a model are, measured on its user's data or expected."""
