"""From what passes find in a graph and what a user asks to a problem in numbers, and from its solution to a plan."""
