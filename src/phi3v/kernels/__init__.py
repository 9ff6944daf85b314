"""Fast paths that are attached to a loaded model from outside; each one equals the plain path that it replaces."""
