"""Rows of a recipe looked at before anything is trained: each once, however often weights repeat it."""

from tiny_tokenizer import build_tokenizer

from phi3v.data.schema import Message, Row, TextPart
from phi3v.data.survey import SurveyOptions
from phi3v.first_look import survey_rows
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor


def row(index: int, text: str, source: str = "a.csv") -> Row:
    return Row((Message("user", (TextPart("?"),)), Message("assistant", (TextPart(text),))), (), {}, source, index)


def test_repeated_rows_are_looked_at_once_and_left_out_everywhere() -> None:
    good, bad = row(0, "yes"), Row((Message("user", (TextPart("?"),)),), (), {}, "a.csv", 1)
    told: list[tuple[str, int, int]] = []
    found = survey_rows(
        [good, bad, good, row(0, "yes", "b.csv"), bad],
        Phi3VProcessor(Phi3VImageProcessor(num_crops=1), build_tokenizer()),
        SurveyOptions(),
        on_progress=lambda *words: told.append(words),
    )
    assert found.kept == [0, 2, 3]
    assert [(fact.source, fact.row) for fact in found.facts] == [("a.csv", 0), ("b.csv", 0)]
    assert [(problem.row, problem.reason_code) for problem in found.problems] == [(1, "no_answer")]
    assert told[-1] == ("looking at the rows", 5, 5)
