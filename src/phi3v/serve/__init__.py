"""A small server in the form of OpenAI's chat completions: one process answers requests, another one owns the model."""
