"""Answers from exported ONNX graphs, by onnxruntime-genai on the CPU, fed with the pixels of our own processor.

In come a folder that `export.onnx` wrote and questions as `ChatModel` takes them, out come its answers. Decoding is
greedy, one question after the other. Where a sequence outgrows the original context its cache is computed again, as in
`model.generation_phi3_v`: the graph chooses its rope factors by the length alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from phi3v.data.images import MAX_PIXELS
from phi3v.errors import CheckpointError, ConfigError, TooLongError
from phi3v.export.onnx import refuse_without_packages
from phi3v.generate import NO_NUMBERS, ChatModel, fixed_system
from phi3v.image_tokens import grid_tokens
from phi3v.loading import load_config, load_processor
from phi3v.passthrough import first_line
from phi3v.targets import graphs_of, refuse_damaged, system_template

CROP = 336
Arrays = dict[str, np.ndarray]


class OnnxChatModel(ChatModel):
    """Graphs and the processor of their model, ready to answer questions about images.

    Example: `OnnxChatModel.from_target("runs/shop/onnx").ask("scarf.jpg", "What is shown in this image?")`.

    Attributes:
        model: an `onnxruntime_genai.Model`.
    """

    def __init__(self, model: Any, processor: Any, system: str | None, config: Any, max_pixels: int) -> None:
        super().__init__(model, processor, system, max_pixels)
        self.image_token_id = processor.image_token_id
        self.context = config.max_position_embeddings
        is_long = config.rope_parameters["rope_type"] == "longrope"
        self.limit = config.original_max_position_embeddings if is_long else None

    @classmethod
    def from_target(cls, target: str | Path, *, max_pixels: int | None = None, **options: Any) -> "OnnxChatModel":
        """Loads a folder of graphs, or the folder `onnx` of a run; there are no options but the largest image.

        Raises: CheckpointError where there are none, or they do not load; MissingPackageError without the runtime.
        """
        assert not options, "graphs run as they were exported"
        folder = graphs_of(target)
        refuse_without_packages(("onnxruntime_genai",))
        refuse_damaged(folder)
        import onnxruntime_genai as genai

        genai.disable_telemetry_events()
        config, processor = load_config(folder), load_processor(folder)
        try:
            model = genai.Model(str(folder))
        except Exception as error:  # it has no classes of its own
            raise CheckpointError(f"{folder} does not load: {first_line(error)}; export it again") from error
        return cls(model, processor, fixed_system(system_template(folder), target), config, max_pixels or MAX_PIXELS)

    def _generate(
        self,
        examples: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
        generation: Mapping[str, Any],
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """One example after the other; texts in their order."""
        if generation:
            raise ConfigError(f"generation.{next(iter(generation))}: ONNX graphs answer greedily, without options")
        return [self.text_of(self.answer_tokens(example, max_new_tokens, streamer)) for example in examples]

    def answer_tokens(
        self, example: Mapping[str, Any], max_new_tokens: int, streamer: BaseStreamer | None = None
    ) -> list[int]:
        """Ids of the answer, the stop token included where one ends it; the image token is never among them.

        Raises: CheckpointError where the graphs' scores are no numbers, of damaged weights or by an overflow.
        """
        ids, images = genai_inputs(example, self.image_token_id)
        prompt = len(ids)
        if prompt >= self.context:
            raise TooLongError(f"the prompt has {prompt} tokens, and the graphs' context ends at {self.context}")
        longest = min(prompt + max_new_tokens, self.context)
        if streamer is not None:
            streamer.put(example["input_ids"])
        generator = self.start(ids, images, longest)
        stops = set(self.processor.stop_token_ids)
        while len(ids) < longest and not (len(ids) > prompt and int(ids[-1]) in stops):
            if len(ids) - 1 == self.limit and len(ids) > prompt:
                generator = self.start(ids, images, longest)
            logits = generator.get_logits()
            if np.isnan(logits).any():
                raise CheckpointError(NO_NUMBERS)
            logits[..., self.image_token_id] = -np.inf
            generator.set_logits(logits)
            generator.generate_next_token()
            token = generator.get_next_tokens()
            ids = np.append(ids, token)
            if streamer is not None:
                streamer.put(torch.from_numpy(token))
        if streamer is not None:
            streamer.end()
        return ids[prompt:].tolist()

    def start(self, ids: np.ndarray, images: Arrays, longest: int) -> Any:
        """An `onnxruntime_genai.Generator` with the sequence in its cache, of which `get_logits` are the last's."""
        import onnxruntime_genai as genai

        settings = genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=longest)
        generator = genai.Generator(self.model, settings)
        if not images:
            generator.append_tokens(ids[None])
            return generator
        inputs = genai.NamedTensors()
        for name, array in {"input_ids": ids[None], **images}.items():
            inputs[name] = array
        generator.set_inputs(inputs)
        return generator


def genai_inputs(example: Mapping[str, Any], image_token_id: int) -> tuple[np.ndarray, Arrays]:
    """An encoded prompt as the graphs take it: int32 ids with -k at image k, and the images' arrays, none without any.

    Example: the ids `[5, 32044 x 313, 7]` with one image of 1 x 1 crops give `[5, -1 x 313, 7]` and its
    `num_image_tokens` are `[[313]]`.
    """
    ids = example["input_ids"].numpy().astype(np.int32)
    if "pixel_values" not in example:
        return ids, {}
    sizes = example["image_sizes"].numpy()
    counts = np.array([grid_tokens(int(rows), int(columns)) for rows, columns in sizes // CROP])
    ids[ids == image_token_id] = -np.repeat(np.arange(1, len(counts) + 1), counts)
    pixels = example["pixel_values"].numpy()
    return ids, {"pixel_values": pixels, "image_sizes": sizes, "num_image_tokens": counts[:, None]}
