"""From any data set to batches: sources -> columns and templates -> rows -> encode -> collate, each in a module.

Receives plain values and a processor; knows no recipes and never imports the model.
"""
