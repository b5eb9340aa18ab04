"""Recipes: the loss of each method, and the divisors of its terms."""
