"""Kept image features: with frozen vision parts each image goes through the tower once, whoever asks for it."""
