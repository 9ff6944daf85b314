"""Prompts and images for Phi-3-V: text with tags, or chats with image parts, become the model's inputs.

In: prompts such as `<|user|>\\n<|image_1|>\\nWhat?<|end|>\\n<|assistant|>\\n`, or conversations, with images. Out:
`input_ids`, `attention_mask` and, when there are images, `pixel_values` and `image_sizes`, named as `forward` names
them. The call itself is transformers'; this class says which image belongs to which tag, and what a tag is replaced by.

The original tokenised the text between image tags piece by piece, each piece with a `<s>` of its own. Replacing a tag
by its image tokens and one `<s>`, in the text, gives the same ids: `<|image|>` swallows nothing but white space to its
right, and there stands `<s>`, which swallows nothing.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from phi3v.errors import DataError
from phi3v.image_tokens import crop_grid

from .chat_phi3_v import (
    CHAT_TEMPLATE,
    IMAGE_TAG,
    TextGuard,
    choose_template,
    drop_guards,
    forget_texts,
    prepare_conversation,
    render_chat,
    restore_normalizer,
)
from .image_processing_phi3_v import Phi3VImageProcessor, Phi3VImageProcessorKwargs
from .image_tags_phi3_v import ImageTags, match_images

STOP_TOKENS = ("</s>", "<|endoftext|>", "<|end|>")
"""What ends an answer: `<|end|>` closes a turn, `<|endoftext|>` follows it in training, `</s>` is in the config."""

CALL_SETTINGS = (
    set(TextKwargs.__annotations__)
    | set(Phi3VImageProcessorKwargs.__annotations__)
    | {"text_kwargs", "images_kwargs", "common_kwargs", "images"}
)
"""Keywords of `apply_chat_template` that are meant for `__call__`; all others are variables of the chat template."""


class Phi3VProcessor(ProcessorMixin):
    """Image processor and tokenizer of Phi-3-V behind one call.

    The tokenizer is the generic fast one, whatever class a folder's files name: transformers' `LlamaTokenizer` gives
    other ids. One step is put in front of its normaliser (see `chat_phi3_v`); it changes no id of ordinary text and is
    not saved.

    Example: with an image of 300 x 200 pixels at 4 crops, `processor(text="<|image_1|>\\\\nHi", images=photo)` gives
    the ids `1, 32044 x 757, 1, 29871, 13, 18567`.
    """

    image_processor: Phi3VImageProcessor
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        image_processor: Phi3VImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<|image|>",
    ) -> None:
        """Takes the two processors; Microsoft's chat template, which knows no image parts, is replaced by ours.

        Raises:
            ValueError: The tokenizer has no such image token.
        """
        super().__init__(
            image_processor, tokenizer, chat_template=choose_template(chat_template, tokenizer.chat_template)
        )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if tokenizer.convert_ids_to_tokens(self.image_token_id) != image_token:
            raise ValueError(f"the tokenizer has no token {image_token}: this is not a tokenizer of Phi-3-V")
        drop_guards(tokenizer.backend_tokenizer)
        forget_texts(tokenizer.backend_tokenizer)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids of the tokens that end an answer, ascending: [2, 32000, 32007] for the real models."""
        known = {name: self.tokenizer.convert_tokens_to_ids(name) for name in STOP_TOKENS}
        return sorted(token for name, token in known.items() if self.tokenizer.convert_ids_to_tokens(token) == name)

    @property
    def img_tokens(self) -> Sequence[str]:
        """The image tags, `img_tokens[0] == "<|image_1|>"`; vLLM asks for them."""
        return ImageTags()

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor counts for this class and `forward` does not take."""
        return ["num_img_tokens"]

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Image tokens of an image of this size: 601 for 1000 x 300 at 4 crops."""
        return self.image_processor.calc_num_image_tokens_from_image_size(width, height)

    def calc_num_image_tokens(self, images: ImageInput) -> list[int]:
        """Image tokens of each image."""
        return self.image_processor.calc_num_image_tokens(images)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Image tokens and crops for images of (height, width) pixels; vLLM's transformers backend asks for them."""
        if image_sizes is None:
            return MultiModalData()
        num_crops = kwargs.get("num_crops") or self.image_processor.num_crops
        grids = [crop_grid(width, height, num_crops) for height, width in image_sizes]
        tokens = [self.calc_num_image_tokens_from_image_size(width, height) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1 + rows * cols for rows, cols in grids])

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """One prompt or many, with the images their tags name.

        Tags are `<|image_1|>`, `<|image_2|>`, ...; each prompt counts its own images from 1, in any order, and may use
        a tag twice. `images` is one image, a list per prompt, or a flat list that the prompts share out by their tags.
        Images come out in the order of their tags in the text. Keywords are those of the tokenizer (`padding`,
        `padding_side`, `max_length`, ...) and of the image processor (`num_crops`, `pad_crops`), and `return_tensors`.
        Microsoft's order, `processor(prompt, images)`, is understood too.

        Returns:
            `input_ids`, `attention_mask` [prompts, length]; with images also `pixel_values` float32
            [images, crops + 1, 3, 336, 336] and `image_sizes` int64 [images, 2], row 0's first.

        Raises:
            DataError: A tag without image, an image without tag, or the image token itself in a prompt.
        """
        if text is not None and is_text(images) and not is_text(text):
            images, text = text, images
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(
        self, images: ImageInput | None = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[list | None, list[str] | None, Any, Any]:
        """A list of prompts, and a flat list of images in the order of their tags; the first step of the call."""
        if text is None:
            return None if images is None else self.image_processor.flatten_images(images), None, videos, audio
        if not is_text(text):
            raise DataError("text must be a prompt or a list of prompts, each a string")
        texts = [text] if isinstance(text, str) else list(text)
        for index, prompt in enumerate(texts):
            if self.image_token in prompt:
                raise DataError(f"prompt {index} holds {self.image_token}: write <|image_1|> where the image belongs")
        matched = match_images(texts, images)
        return self.image_processor.flatten_images(matched) if matched else None, texts, videos, audio

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Refuses what Phi-3-V cannot read; tags and images were matched before."""
        if images is None and text is None:
            raise DataError("there is nothing to process: pass text, images or both")
        if videos is not None or audio is not None:
            raise DataError("Phi-3-V reads text and images only, no videos and no audio")

    def _process_images(self, images: list, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """Pixels of the images, and what each image's tag is replaced by."""
        processed = self.image_processor(images, **kwargs)
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Text that stands for an image: its image tokens, then the `<s>` of the text that follows."""
        return self.image_token * int(image_inputs["num_img_tokens"][image_idx]) + self.tokenizer.bos_token

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Sequence[str] = (), *args: Any, **kwargs: Any
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Puts the replacements in place of the tags, in order, and says where: transformers' form of the offsets.

        Example: `(["a<|image_1|>b"], ["XY"])` gives `["aXYb"]` and
        `[[{"type": "image", "span": (1, 12), "new_span": (1, 3), "text": "<|image_1|>", "replacement": "XY"}]]`.
        """
        if not images_replacements:
            return text, [[] for _ in text]
        waiting = iter(images_replacements)
        expanded, offsets = [], []
        for prompt in text:
            pieces, spans, last, gained = [], [], 0, 0
            for tag in IMAGE_TAG.finditer(prompt):
                new, start = next(waiting), tag.start() + gained
                pieces += [prompt[last : tag.start()], new]
                spans.append(
                    {
                        "type": "image",
                        "span": tag.span(),
                        "new_span": (start, start + len(new)),
                        "text": tag.group(),
                        "replacement": new,
                    }
                )
                gained += len(new) - len(tag.group())
                last = tag.end()
            expanded.append("".join([*pieces, prompt[last:]]))
            offsets.append(spans)
        return expanded, offsets

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders one conversation or many, and with `tokenize` also processes them, images included.

        Text of messages stays text: it never becomes a control token, nor an image tag (see `chat_phi3_v`). Arguments
        are transformers' own; keywords of `__call__` may stand beside them or in `processor_kwargs`, which may also
        hold the `images` of image parts that name none.

        Returns:
            Prompts, or with `tokenize` input ids, or with `return_dict` too what `__call__` returns; with
            `return_assistant_tokens_mask` also `assistant_masks`, 1 at the tokens of the assistant's turns: their text,
            `<|end|>` and the newline.

        Raises:
            DataError: As `prepare_conversation`, or an image part without an image.
        """
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise ValueError(f"continue_final_message and {other} exclude each other: set one of them")
        if isinstance(conversation, Mapping):
            raise DataError("a conversation is a list of messages, and one message was given: put it into a list")
        settings = {**(processor_kwargs or {}), **{key: kwargs.pop(key) for key in CALL_SETTINGS & set(kwargs)}}
        images = settings.pop("images", None)
        is_batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        prompts, spans, found = self._render_chats(
            conversation if is_batched else [conversation],
            chat_template=self._named_template(chat_template),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **kwargs,
        )
        if not tokenize:
            return prompts if is_batched else prompts[0]
        if return_tensors not in ("auto", None):
            settings["return_tensors"] = return_tensors
        turns = spans if return_assistant_tokens_mask else None
        batch = self._process_chats(prompts, found if images is None else images, turns, settings)
        return batch if return_dict else batch["input_ids"]

    def _named_template(self, name: str | None) -> str:
        """The template to render: the one asked for by name or text, else the processor's."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if name is None and "default" not in templates:
            raise ValueError(f"no chat template is named default: pass chat_template, one of {sorted(templates)}")
        return templates["default"] if name is None else templates.get(name, name)

    def _render_chats(
        self, conversations: Sequence[Any], **template_settings: Any
    ) -> tuple[list[str], list[list[tuple[int, int]]], list[list[Any]]]:
        """Prompts, the characters that assistant turns span in them (when asked for), and the images of each."""
        for already_done in ("sanitize_control_tokens", "load_audio_from_video"):
            template_settings.pop(already_done, None)
        added = self.tokenizer.added_tokens_decoder.values()
        guard = TextGuard(token.content for token in added if not token.normalized)
        prepared = [prepare_conversation(messages, guard) for messages in conversations]
        chats, images = [messages for messages, _ in prepared], [found for _, found in prepared]
        needs_jinja = ("continue_final_message", "return_assistant_tokens_mask")
        if template_settings["chat_template"] == CHAT_TEMPLATE and not any(map(template_settings.get, needs_jinja)):
            add_prompt = bool(template_settings.get("add_generation_prompt"))
            return [render_chat(messages, add_prompt) for messages in chats], [[] for _ in chats], images
        if template_settings.get("continue_final_message"):
            ends = [messages[-1]["content"][-1:] for messages in chats]
            if any(isinstance(end, list) and end and end[0]["type"] == "image" for end in ends):
                raise DataError("continue_final_message goes on with text, and the last message ends with an image")
        settings = {**self.tokenizer.special_tokens_map, **template_settings}
        prompts, spans = render_jinja_template(conversations=chats, **settings)
        return prompts, spans, images

    def _process_chats(
        self, prompts: list[str], images: Any, spans: list[list[tuple[int, int]]] | None, settings: dict[str, Any]
    ) -> BatchFeature:
        """`__call__` on rendered chats; with `spans` it also makes `assistant_masks`."""
        for index, own in enumerate(images):
            if isinstance(own, list) and any(image is None for image in own):
                raise DataError(f"conversation {index} has an image part without an image, path or URL")
        # A chat starts with one `<s>`, whoever writes it. Callers that expect it in the template (trl does) forbid the
        # tokenizer to add it; Microsoft's layout has none.
        settings = {**settings, "add_special_tokens": not prompts[0].startswith(self.tokenizer.bos_token)}
        if spans is None:
            return self(text=prompts, images=images, **settings)
        offsets = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        batch = self(text=prompts, images=images, **{**settings, **offsets, "return_tensors": None})
        rows = zip(batch.pop("offset_mapping"), spans, batch.pop("text_replacement_offsets"), strict=True)
        batch["assistant_masks"] = [mask_tokens(*row) for row in rows]
        return BatchFeature(dict(batch), tensor_type=settings.get("return_tensors"))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        """Loads image processor and tokenizer by class: what the files say about classes and code plays no part."""
        for key in ("trust_remote_code", "backend"):  # there is one way to make pixels, as for AutoImageProcessor
            kwargs.pop(key, None)
        image_processor = Phi3VImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        settings = {key: value for key, value in kwargs.items() if key not in Phi3VImageProcessorKwargs.__annotations__}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **settings)
        tokenizer.init_kwargs.pop("auto_map", None)  # remote code that is never run, and not to be saved again
        return [image_processor, tokenizer]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes the processor, its chat template and the tokenizer with its original pipeline.

        Older readers (transformers 4, vLLM, onnxruntime-genai) find what they look for too: `preprocessor_config.json`,
        and a tokenizer class that they know and that keeps the ids.
        """
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        restore_normalizer(folder / "tokenizer.json")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        self.image_processor.save_pretrained(folder)
        return files


def is_text(value: Any) -> bool:
    """Whether a value is a prompt or a list of prompts."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
    )


def mask_tokens(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], replaced: Sequence[dict[str, Any]]
) -> list[int]:
    """1 for each token whose characters lie in one of the spans, 0 for the others and for replacements.

    `offsets` are each token's characters in the expanded text, `spans` are characters of the text before tags were
    replaced. A token that starts before a span and reaches into it is no part of it: `<|assistant|>` swallows white
    space.

    Example: offsets `[(0, 0), (0, 3), (3, 5), (5, 6)]`, spans `[(3, 5)]`, nothing replaced: `[0, 0, 1, 0]`.
    """
    ends = [replacement["span"][1] for replacement in replaced]
    gained = [0, *(replacement["new_span"][1] - replacement["span"][1] for replacement in replaced)]
    moved = [tuple(char + gained[bisect_right(ends, char)] for char in span) for span in spans]
    images = [replacement["new_span"] for replacement in replaced]

    def inside(start: int, end: int, ranges: Sequence[tuple[int, int]]) -> bool:
        return any(first <= start and start < end <= last for first, last in ranges)

    return [int(inside(start, end, moved) and not inside(start, end, images)) for start, end in offsets]


__all__ = ["Phi3VProcessor"]
