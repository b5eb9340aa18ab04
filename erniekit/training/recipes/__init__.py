"""Recipes: the loss of each method, and what its terms are divided by."""
