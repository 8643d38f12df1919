"""One graph: search for a plan, generate its code, audit that code."""
