"""The model that comes with the package as ONNX graphs, on prompts of many sizes, in each precision."""

import pytest
from onnx_prompts import compare, encoded

from phi3v.demo import tiny_model_path
from phi3v.export.onnx_runtime import OnnxChatModel
from phi3v.export.run import export
from phi3v.generate import ChatModel

LIMIT = 4096
# crops at most, photos, words of the question, tokens where they are counted
PROMPTS = [
    (1, [(336, 336)], 3, None),
    (1, [(50, 50)], 3, None),
    (1, [(900, 1400)], 6, None),
    (2, [(33, 700)], 3, None),
    (4, [(1000, 300)], 4, None),
    (4, [(300, 1000)], 4, None),
    (4, [(1200, 900)], 5, None),
    (6, [(640, 480)], 3, None),
    (9, [(500, 2000)], 3, None),
    (16, [(2000, 500)], 3, None),
    (16, [(1344, 1344)], 3, None),
    (1, [(200, 300), (300, 200)], 8, None),
    (4, [(1000, 300), (90, 90), (700, 700)], 8, None),
    (2, [(400, 300)] * 5, 10, None),
    (4, [], 3, None),
    (4, [], 400, None),
    (16, [(1400, 1400), (1344, 900)], 3, None),  # 2 images: 4,900 tokens
    (4, [(700, 700)], 4200, None),
    (1, [], 5000, None),
    (4, [(700, 500)], 3, LIMIT - 1),
    (4, [(700, 500)], 3, LIMIT),
    (4, [(700, 500)], 3, LIMIT + 1),
    (1, [], 3, LIMIT - 2),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def compared(precision, tmp_path):
    """All prompts by the graphs of this precision and by PyTorch in float32."""
    pytest.importorskip("onnxruntime_genai")
    export(tiny_model_path(), tmp_path / "onnx", to="onnx", precision=precision)
    expected, found = (
        ChatModel.from_target(tiny_model_path(), device="cpu"),
        OnnxChatModel.from_target(tmp_path / "onnx"),
    )
    results = []
    for crops, sizes, words, tokens in PROMPTS:
        for chat in (expected, found):
            chat.processor.image_processor.num_crops = crops
        example = encoded(expected, sizes, words, tokens)
        results.append(compare(expected, found, example=example, max_new_tokens=12))
    return results


def test_float32_gives_the_logits_and_the_answers_of_pytorch(tmp_path):
    results = compared("fp32", tmp_path)
    assert len(results) >= 20 and sum(one.prompt > LIMIT for one in results) >= 4
    assert any(one.prompt <= LIMIT < one.prompt + len(one.tokens) for one in results)
    assert [one for one in results if one.furthest > 1e-3 or one.tokens != one.expected] == []
    print(*results, sep="\n")


@pytest.mark.parametrize("precision, least, answers", [("fp16", 0.99, 0.9), ("int4", 0.5, 0.0)])
def test_smaller_numbers_agree_mostly(precision, least, answers, tmp_path):
    results = compared(precision, tmp_path)
    positions = sum(one.prompt for one in results)
    share = sum(one.prompt * one.same_top for one in results) / positions
    same = sum(one.tokens == one.expected for one in results) / len(results)
    print(*results, f"{precision}: {share:.4f} of {positions}, {same:.3f} of {len(results)} answers", sep="\n")
    assert share >= least and same >= answers
