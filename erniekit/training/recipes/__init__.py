"""A method is a loss and what it divides by."""
