"""Phi-3-Vision native to transformers 5, in the form of a transformers model folder.

`phi3v.model.register.register()` makes the classes known to the Auto classes. Importing this package imports nothing
heavy; the modules below it import torch and transformers and nothing else of phi3v but `phi3v.image_tokens` (plain
arithmetic) and `phi3v.errors`.
"""
