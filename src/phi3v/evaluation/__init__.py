"""How good the answers are: scores, controls and the report of a run.

`metrics` is pure arithmetic over strings, `run` asks a model and scores what it says, `controls` asks again with the
images spoiled, `report` turns a run's files into one HTML page. Nothing here trains or prints.
"""
