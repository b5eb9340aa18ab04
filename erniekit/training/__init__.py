"""One trainer, one step, one build order; a method is a recipe."""
