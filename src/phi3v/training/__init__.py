"""Training: from a recipe to a tuned adapter or model, by way of transformers' Trainer."""
