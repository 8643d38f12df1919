"""What runs with the user's program: calls, steps, their memory, and what is known of their graphs."""
