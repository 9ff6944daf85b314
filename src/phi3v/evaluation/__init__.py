"""How good the answers are: scores, controls and the report of a run.

`kinds`, `row_scores` and what they use are pure arithmetic over strings, `intervals` and `paired` over numbers; `run`
asks a model and scores what it says, `controls` asks again with the images spoiled, `report` turns a run's files into
one HTML page, `compare` those of several. Nothing here trains or prints.
"""
