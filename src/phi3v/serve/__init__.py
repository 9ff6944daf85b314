"""Answers over HTTP: a small server in the form of OpenAI's chat completions, and a page to try a model."""
