"""Hand-written parts of a decoder layer, attached from outside: the model's own code knows nothing of them."""
