"""A small world of its own: generated scenes and products, a tiny Phi-3-V that comes with the package, and the demo.

What makes this world special is in this folder alone; the rest of the package treats it like any model and any data.
"""
