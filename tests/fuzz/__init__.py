"""Networks, options and steps at random, and what must hold for each: the machine that finds the next fault."""
