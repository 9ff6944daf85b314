"""Answers over HTTP: what is asked from outside, of a model that stays in memory."""
