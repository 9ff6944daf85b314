"""vLLM puts image tokens into a prompt in its own way, with our tokenizer and processor: the ids are those of ours.

Its steps are written out here after `Phi3VMultiModalProcessor._apply_prompt_updates` of vLLM 0.33.0 (Apache 2.0). vLLM
itself is not run.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.generate import conversation
from phi3v.loading import load_processor

TAG = r"<\|image_\d+\|>"


def ids_of_vllm(processor: Any, prompt: str, photos: list[Image.Image]) -> list[int]:
    """Back to text, tokenised between the tags, each tag replaced by as many image tokens as the processor counts."""
    tokenizer = processor.tokenizer
    text = tokenizer.decode(tokenizer(prompt).input_ids[1:])
    for special in tokenizer.all_special_tokens:
        text = text.replace(f"{special} ", special)
    chunks = [tokenizer(chunk).input_ids for chunk in re.split(TAG, text)]
    counts = [processor.calc_num_image_tokens_from_image_size(width=one.width, height=one.height) for one in photos]
    assert re.findall(TAG, text) == list(processor.img_tokens[: len(photos)])
    images = [*([processor.image_token_id] * count for count in counts), []]
    return [token for pair in zip(chunks, images, strict=True) for part in pair for token in part]


@pytest.mark.parametrize("name", ["Phi-3-vision-128k-instruct", "Phi-3.5-vision-instruct"])
def test_prompts_have_the_same_ids(name: str, shared: Path) -> None:
    processor = load_processor(shared / "phi3v" / "hub" / name)
    assert processor.image_token_id == 32044  # vLLM has it built in
    photos = [Image.new("RGB", size) for size in ((500, 300), (200, 700))]
    turns = conversation(photos[:1], "What is  shown?\nAnd 2?", "Be brief.")
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "A scarf, 470 €"}]}]
    for chat, shown in (
        (conversation(photos[:1], "What is  shown?\nAnd 2?"), photos[:1]),
        (conversation(photos, "é ü 漢"), photos),
        ([*turns, *conversation(photos[1:], "And this?")], photos),
    ):
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        ours = processor(text=prompt, images=shown, return_tensors="pt")["input_ids"][0].tolist()
        assert ids_of_vllm(processor, prompt, shown) == ours
