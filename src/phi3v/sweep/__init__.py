"""`phi3v sweep`: many trainings of one recipe with other values, chosen by Optuna, and the best of them."""
