"""Evaluation: what a tuned model can do that its base cannot, measured on held-out questions."""
