"""What generation with Phi-3-V needs beyond transformers' `GenerationMixin`.

Rows padded on the right are moved to the left; beams and several sequences a prompt repeat the images of a row as a
block; where a row outgrows the original context its cached keys are computed again with the long rope factors, for that
row alone, and guesses of an assistant end there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.candidate_generator import CandidateGenerator

from .placement_phi3_v import image_mask, image_order, images_per_row, new_images

# The published configurations stop at </s> only, which the models practically never produce: their turns end with
# <|end|> and <|endoftext|>. `generate` stops at all three unless it is told otherwise.
PUBLISHED_EOS, PUBLISHED_STOPS = 2, [2, 32000, 32007]

IMAGE_ARGUMENTS = ("pixel_values", "image_sizes", "image_features", "global_views")


def move_padding_left(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Column order that moves the padding of each row to the left, or None where it is there already.

    Example: the mask `[[1, 1, 0]]` gives `[[2, 0, 1]]`; `[[0, 1, 1]]` gives None.
    """
    order = attention_mask.argsort(dim=-1, stable=True)
    steady = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return None if torch.equal(order, steady) else order


class Phi3VGenerationMixin(GenerationMixin):
    """transformers' `GenerationMixin` with what Phi-3-V needs; mixed into `Phi3VForCausalLM`."""

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, for prompts padded on either side and with different numbers of images.

        Rows stay in the caller's order; the returned prompts are padded on the left. A model whose own settings name no
        end but the published ones stops at `</s>`, `<|endoftext|>` and `<|end|>`, unless the caller chose an
        `eos_token_id`: as argument, or in a `generation_config` another than the model's own or the published one (2).
        The image token is never generated. Padding is what `attention_mask` says: without one there is none, since the
        id of the padding also ends answers.
        """
        if isinstance(kwargs.get("image_features"), list):
            pixels = kwargs.pop("pixel_values", None)
            kwargs["image_features"] = self.model.fill_features(kwargs["image_features"], pixels, kwargs["image_sizes"])
        name = "inputs" if inputs is not None else "input_ids"
        input_ids, mask = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        fresh = cache is None or int(cache.get_seq_length()) == 0
        if mask is not None and mask.ndim == 2 and fresh and (order := move_padding_left(mask)) is not None:
            input_ids = None if input_ids is None else input_ids.gather(1, order)
            for key in ("attention_mask", "position_ids", "inputs_embeds"):
                if kwargs.get(key) is not None:
                    kwargs[key] = kwargs[key].take_along_dim(order[..., None] if kwargs[key].ndim == 3 else order, 1)
        as_given = input_ids
        if input_ids is not None:
            input_ids = self._with_image_token(input_ids, kwargs)
            kwargs.pop("input_ids", None)
            kwargs[name] = input_ids
        if "eos_token_id" not in kwargs and self._stops_as_published(generation_config):
            kwargs["eos_token_id"] = list(PUBLISHED_STOPS)
        if self.config.image_token_id is not None and "suppress_tokens" not in kwargs:
            unwanted = getattr(generation_config or self.generation_config, "suppress_tokens", None) or []
            kwargs["suppress_tokens"] = [*unwanted, self.config.image_token_id]
        output = super().generate(generation_config=generation_config, **kwargs)
        return output if as_given is None or input_ids is as_given else with_prompts(output, as_given)

    def _stops_as_published(self, given: GenerationConfig | None) -> bool:
        """Whether neither the model's own settings nor the given ones name an end of their own.

        A trainer may have made [32000, 2] of the model's 2. Given settings are mostly a copy of the model's or the
        hub's: what they repeat was not chosen.

        Example: the model's [32000, 2] and no settings, or settings with 2 -> True; with 32007 alone, or 103 -> False.
        """
        own, theirs = self.generation_config.eos_token_id, getattr(given, "eos_token_id", None)
        ends = own if isinstance(own, list) else [own]
        if self.config.vocab_size <= max(PUBLISHED_STOPS) or not {None, *PUBLISHED_STOPS}.issuperset(ends):
            return False
        return theirs in (None, own, PUBLISHED_EOS, [PUBLISHED_EOS])

    def _with_image_token(self, input_ids: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """Ids that hold the image token for Microsoft's negative ids, and the images in the order of the text.

        Logits processors look ids up in the vocabulary, where negative ones have no place.
        """
        if self.config.image_token_id is None or not bool((input_ids < 0).any()):
            return input_ids
        counts = self._token_counts(kwargs)
        if counts:
            order = image_order(input_ids, counts)
            if order is not None and order != list(range(len(counts))):
                kwargs |= pick_images(kwargs, counts, order)
        return input_ids.masked_fill(input_ids < 0, self.config.image_token_id)

    def load_custom_generate(
        self, pretrained_model_name_or_path: Any = None, trust_remote_code: bool | None = None, **kwargs: Any
    ) -> NoReturn:
        """A folder's own `custom_generate/generate.py` is never run, whatever `trust_remote_code` says.

        Raises: OSError, always; `from_pretrained` takes it for a folder that has no such file.
        """
        raise OSError(
            f"custom_generate={str(pretrained_model_name_or_path)!r}: code of a repository is not run for Phi-3-V; "
            "pass the function itself"
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next step; rebuilds the cache of rows that outgrow the original context with it.

        Images go with the pass that meets their tokens: the first one over an empty cache, which transformers does not
        call the first where an assistant drafts, or the first of a turn that brings images of its own.
        """
        if past_key_values is not None and not torch.compiler.is_compiling():
            given = kwargs | ({} if inputs_embeds is None else {"inputs_embeds": inputs_embeds})
            self._rebuild_long_rows(input_ids, next_sequence_length, past_key_values, attention_mask, given)
            if next_sequence_length != 1:  # no image is one token; the length of a static cache is a look at the device
                if int(past_key_values.get_seq_length()) == 0:
                    is_first_iteration = is_first_iteration or inputs_embeds is None
                elif is_first_iteration and next_sequence_length is not None:
                    kwargs |= self._images_of_new_columns(input_ids, next_sequence_length, kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("image_features", None)  # like pixel values, they are placed once
        return super().prepare_inputs_for_generation(
            input_ids=input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """transformers' source of guesses, whose guesses end at the original context while the row is within it.

        A longer pass would look at tokens within the limit with the factors of a longer sequence. Assisted decoding
        takes one row.
        """
        generator = super()._get_candidate_generator(*args, **kwargs)
        if self.config.rope_parameters["rope_type"] != "default":
            mask = kwargs["model_kwargs"].get("attention_mask")
            padding = int((mask == 0).sum()) if mask is not None and mask.ndim == 2 else 0
            width = self.config.original_max_position_embeddings + padding
            setattr(generator, "get_candidates", partial(guesses_within, generator.get_candidates, width))  # noqa: B010
        return generator

    def _rebuild_long_rows(
        self, input_ids: torch.Tensor, new: int | None, cache: Cache, mask: torch.Tensor | None, kwargs: dict
    ) -> None:
        """Computes the cached keys of a row again when its length passes the limit with the coming step.

        Up to the limit keys are rotated with the short factors, beyond it with the long ones; a cache that mixes both
        gives other logits than a full pass. Other rows keep their cache. `new` is the number of columns of `input_ids`
        that come now (None: all). Where the prompt came as `inputs_embeds`, ids may be those of the answer alone.

        Raises: ValueError if only new tokens were passed, so that the cached ones cannot be computed again.
        """
        limit, width = self.config.original_max_position_embeddings, input_ids.shape[1]
        past = int(cache.get_seq_length())
        total = past + (width if new is None else new)
        if self.config.rope_parameters["rope_type"] == "default" or past == 0 or total <= limit:
            return
        padding = [0] * input_ids.shape[0]
        if mask is not None and mask.ndim == 2:
            padding = (mask == 0).sum(-1).tolist()
        prompt = kwargs.get("inputs_embeds")
        answered = 0 if prompt is None else total - prompt.shape[1]  # columns behind the embeddings
        for row, pad in enumerate(padding):
            if past - pad <= limit < total - pad:
                if width < total and (prompt is None or width != answered):
                    raise ValueError(
                        f"row {row} passes the original context of {limit} tokens with a cache whose token ids are not "
                        "known: pass the whole sequence as input_ids, the cached part included, and no "
                        "prefill_chunk_size"
                    )
                if prompt is not None:
                    answer = self.model.embed_tokens(input_ids[:, width - answered :])
                    kwargs = kwargs | {"inputs_embeds": torch.cat([prompt, answer.to(prompt)], dim=1)}
                fresh = self._full_pass(input_ids, row, pad, kwargs)
                copy_row(fresh, cache, row, pad, past)

    def _images_of_new_columns(self, input_ids: torch.Tensor, new: int, kwargs: dict) -> dict[str, torch.Tensor]:
        """The images of the last `new` columns, where those of the whole sequence were given beside a cache."""
        if not has_images(kwargs) or bool((input_ids < 0).any()):  # negative ids name images of the columns they are in
            return {}
        counts = self._token_counts(kwargs)
        picks = new_images(image_mask(input_ids, self.config.image_token_id), new, counts)
        return {} if picks is None else pick_images(kwargs, counts, picks)

    def _token_counts(self, kwargs: dict) -> list[int]:
        """Image tokens of each image that was given; none without sizes, which `forward` refuses."""
        if not has_images(kwargs) or kwargs.get("image_sizes") is None:
            return []
        return self.model.vision_embed_tokens.token_counts(kwargs["image_sizes"])

    def _full_pass(self, input_ids: torch.Tensor, row: int, pad: int, kwargs: dict) -> DynamicCache:
        """Cache of one row, computed in one pass without its padding.

        Raises: ValueError if images of the cached part were not given again.
        """
        images: dict[str, torch.Tensor] = {}
        fresh = DynamicCache(config=self.config)
        if (embeddings := kwargs.get("inputs_embeds")) is not None:
            self.model(inputs_embeds=embeddings[row : row + 1, pad:], past_key_values=fresh, use_cache=True)
            return fresh
        if bool(image_mask(input_ids[row], self.config.image_token_id).any()):
            counts = self._token_counts(kwargs)
            try:
                rows = images_per_row(input_ids, self.config.image_token_id, counts)
            except ValueError as error:
                raise ValueError(
                    f"row {row} passes the original context of {self.config.original_max_position_embeddings} tokens, "
                    "so its cache is computed again: pass pixel_values and image_sizes of all images in input_ids, "
                    "those in the cached part included"
                ) from error
            first = sum(rows[:row])
            images = pick_images(kwargs, counts, list(range(first, first + rows[row])))
        self.model(input_ids=input_ids[row : row + 1, pad:], past_key_values=fresh, use_cache=True, **images)
        return fresh

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeats rows for beams; the images of a row are repeated as a block, as the rows need them.

        Example: rows with images [a, b] and [c], twice each: [a, b, a, b, c, c].
        """
        images = {key: model_kwargs.pop(key) for key in IMAGE_ARGUMENTS if key in model_kwargs}
        if input_ids is not None and has_images(images) and expand_size > 1:
            counts = self.model.vision_embed_tokens.token_counts(images["image_sizes"])
            picks, first = [], 0
            for number in images_per_row(input_ids, self.config.image_token_id, counts):
                picks += list(range(first, first + number)) * expand_size
                first += number
            images = pick_images(images, counts, picks)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images


def guesses_within(
    guess: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], width: int, input_ids: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `get_candidates` of transformers returns, ids `[1, columns]` and logits or None, up to `width` columns.

    A row that is wider already has all its guesses. Example: 62 ids, 5 guesses and `width=64` give 64 ids and the
    logits of 2 guesses; 64 ids, none; 65 ids, all 70.
    """
    length = input_ids.shape[1]
    if length == width:
        return input_ids, None
    ids, logits = guess(input_ids, **kwargs)
    if length > width or ids.shape[1] <= width:
        return ids, logits
    return ids[:, :width], None if logits is None else logits[:, : width - length]


def with_prompts(output: Any, prompts: torch.Tensor) -> Any:
    """What `generate` returned, with the caller's ids where the prompts stand; each prompt may have several answers.

    Example: sequences `[[9, 5, 7], [9, 5, 8]]` of the prompt `[[-1, 5]]` give `[[-1, 5, 7], [-1, 5, 8]]`.
    """
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    given = prompts.repeat_interleave(sequences.shape[0] // prompts.shape[0], dim=0).to(sequences.device)
    sequences = torch.cat([given, sequences[:, prompts.shape[1] :]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


def has_images(arguments: dict) -> bool:
    """Whether pixel values or image features are among these arguments of `forward`, and of one image or more."""
    sizes = arguments.get("image_sizes")
    if sizes is not None and len(sizes) == 0:
        return False
    return arguments.get("pixel_values") is not None or arguments.get("image_features") is not None


def pick_images(arguments: dict, counts: list[int], picks: list[int]) -> dict[str, torch.Tensor]:
    """The image arguments of some images, in the order of `picks`; `counts` are the tokens of each image.

    Example: `picks=[1, 1]` with features of two images of 2 and 3 tokens gives the last 3 rows twice.

    Raises: ValueError for pixels that are not one row of crops an image.
    """
    picked = {"image_sizes": torch.as_tensor(arguments["image_sizes"])[picks]}
    if arguments.get("pixel_values") is not None:
        if arguments["pixel_values"].ndim != 5:
            raise ValueError("flat crops are for training: to answer, pass pixel_values [images, crops, 3, 336, 336]")
        picked["pixel_values"] = arguments["pixel_values"][picks]
    if arguments.get("image_features") is not None:
        pieces = arguments["image_features"].split(counts)
        picked["image_features"] = torch.cat([pieces[image] for image in picks])
    return picked


def copy_row(fresh: Cache, cache: Cache, row: int, pad: int, past: int) -> None:
    """Writes the keys and values of `fresh` (one row, no padding) over positions `pad` to `past` of one row of `cache`.

    Raises: ValueError if the cache does not hold plain keys and values (quantised caches).
    """
    for source, target in zip(fresh.layers, cache.layers, strict=True):
        if not isinstance(target.keys, torch.Tensor) or target.keys.shape[2] < past:
            raise ValueError(
                f"a cache of type {type(target).__name__} cannot pass the model's original context while decoding: "
                "use the default cache or a static one"
            )
        target.keys[row, :, pad:past] = source.keys[0, :, : past - pad].to(target.keys.device)
        target.values[row, :, pad:past] = source.values[0, :, : past - pad].to(target.values.device)
