"""Phi-3-Vision: transformers' Phi-3 decoder over text embeddings and projected CLIP features.

Module paths are Microsoft's own (`model.layers.0.self_attn.qkv_proj`, `model.vision_embed_tokens.…`), so weights and
adapters need no renaming. Image features stand at ordinary causal positions; there is no cross attention.

Letters: B rows, S positions, T image tokens of the batch, K kept positions, H hidden size.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.phi3.modeling_phi3 import Phi3Model, Phi3PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_phi3_v import Phi3VConfig
from .generation_phi3_v import Phi3VGenerationMixin
from .placement_phi3_v import (
    image_mask,
    image_order,
    missing_images,
    place_features,
    refuse_images_beside_embeddings,
)
from .rope_phi3_v import Phi3VRotaryEmbedding, positions_from_mask
from .step_phi3_v import Phi3VLastDecoderLayer, hidden_at, place_at
from .vision_phi3_v import Phi3VImageEmbedding


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    """What all Phi-3-V models share: configuration class, initialisation, what may be split over devices."""

    config_class = Phi3VConfig
    config: Phi3VConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Phi3DecoderLayer", "Phi3VLastDecoderLayer", "Phi3VImageEmbedding"]
    # `wte` is a second name of `embed_tokens` in files written with shared tensors; `position_ids` was a buffer in old
    # CLIP files.
    _keys_to_ignore_on_load_unexpected = [
        r"model\.vision_embed_tokens\.wte\.weight",
        r"vision_model\.embeddings\.position_ids",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Phi3VRotaryEmbedding):
            short, long, _ = module.frequencies()
            init.copy_(module.short_inv_freq, short)
            init.copy_(module.long_inv_freq, long)
        elif isinstance(module, Phi3VImageEmbedding):
            init.normal_(module.glb_GN, std=self.config.initializer_range)
            init.normal_(module.sub_GN, std=self.config.initializer_range)

    def load_adapter(self, *args: Any, load_config: LoadStateDictConfig | None = None, **kwargs: Any) -> Any:
        """transformers' `load_adapter`, which would leave DoRA's magnitudes (`lora_magnitude_vector`) as they began."""
        config = load_config or LoadStateDictConfig()
        names = config.weight_mapping or get_model_conversion_mapping(self)
        magnitudes = WeightRenaming(r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")
        return super().load_adapter(*args, load_config=replace(config, weight_mapping=[*names, magnitudes]), **kwargs)


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """The decoder without its head, with images placed into its input embeddings."""

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.layers[-1].__class__ = Phi3VLastDecoderLayer  # the same weights; a second layer is never made
        self.rotary_emb = Phi3VRotaryEmbedding(config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list,
        global_views: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embeddings of the images: `pooler_output` is a tuple with one tensor `[tokens of the image, H]` per image."""
        features, counts = self.vision_embed_tokens(pixel_values, image_sizes, global_views)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features.split(counts))

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | list | None,
        image_features: torch.Tensor | list | None = None,
        image_positions: torch.Tensor | None = None,
        global_views: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Input embeddings `[B, S, H]`: text from the table, image tokens from the images.

        With `image_positions` (see `Phi3VForCausalLM.forward`) images are placed without a look at the ids.
        """
        is_image = image_mask(input_ids, self.config.image_token_id)
        embeddings = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        if pixel_values is None and image_features is None:
            return embeddings
        if image_sizes is None:
            raise ValueError("images were given without image_sizes: pass what the processor returned, both together")
        if isinstance(image_features, list):
            features = self.fill_features(image_features, pixel_values, image_sizes, global_views)
        elif image_features is not None:
            features = image_features
        else:
            features, _ = self.vision_embed_tokens(pixel_values, image_sizes, global_views)
        if image_positions is not None:
            return place_at(embeddings, self.vision_embed_tokens.drop(features), image_positions)
        counts = self.vision_embed_tokens.token_counts(image_sizes)
        order = image_order(input_ids, counts)
        features = self.vision_embed_tokens.drop(place_features(features, counts, order, is_image))
        # Under autocast the features come in another dtype than the embeddings.
        return embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))

    def fill_features(
        self,
        features: list,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | list,
        global_views: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features `[T, H]` of all images, where some are given and the others are made of their pixels.

        Args:
            features: in the order of the images, the features of one or more of them, or None for one without.
            pixel_values: of the images without, in their order.
            image_sizes: of all images.
            global_views: of the images without, where `pixel_values` are bytes.
        Example: four images and `features=[a, None, b]` with `a` as long as the first two together: the pixels are
        those of the third image, and its features come between `a` and `b`.

        Raises: ValueError if the features are not those of the sizes.
        """
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        missing = missing_images(features, self.vision_embed_tokens.token_counts(sizes))
        fresh: tuple[torch.Tensor, ...] = ()
        if missing:
            if pixel_values is None:
                raise ValueError(f"image_features leave images {missing} open, and no pixel_values were given for them")
            made, lengths = self.vision_embed_tokens(pixel_values, [sizes[image] for image in missing], global_views)
            fresh = made.split(lengths)
        rest = iter(fresh)
        device = self.embed_tokens.weight.device
        return torch.cat([next(rest) if one is None else one.to(device, non_blocking=True) for one in features])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list | None = None,
        image_features: torch.Tensor | list | None = None,
        use_cache: bool | None = None,
        trained_positions: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        global_views: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `Phi3VForCausalLM.forward`; returns hidden states after the final norm, `[B, S, H]`.

        With `trained_positions` they are `[1, K, H]`, of these K positions alone; a cache must be empty then.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        refuse_images_beside_embeddings(inputs_embeds, pixel_values, image_features)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if inputs_embeds is None:
            assert input_ids is not None
            given = pixel_values is not None or image_features is not None
            none = image_sizes is not None and len(image_sizes) == 0
            if given and (none or self._images_are_cached(input_ids, past)):
                pixel_values = image_features = None
            self._refuse_blind_images(input_ids, pixel_values, image_features, past, image_positions)
            inputs_embeds = self.embed(
                input_ids, pixel_values, image_sizes, image_features, image_positions, global_views
            )
        if trained_positions is not None:
            if past or (attention_mask is not None and attention_mask.ndim == 2):
                raise ValueError("trained_positions: rows padded on the right, no attention_mask, nothing cached")
            cache = {"past_key_values": past_key_values}
            states = hidden_at(self, inputs_embeds, position_ids, trained_positions, attention_mask, **cache, **kwargs)
            return BaseModelOutputWithPast(last_hidden_state=states, **cache)
        if position_ids is None:
            length = inputs_embeds.shape[1]
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = positions_from_mask(attention_mask, length)
            else:
                position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        if kwargs.get("cu_seqlens") is not None:
            use_cache = False  # beside a cache transformers takes a pack for one sequence
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _images_are_cached(self, input_ids: torch.Tensor, past: int | torch.Tensor) -> bool:
        """Whether images were given again beside a cache, though none of their tokens come in now."""
        if torch.compiler.is_compiling() or input_ids.device.type == "meta" or int(past) == 0:
            return False
        return not bool(image_mask(input_ids, self.config.image_token_id).any())

    def _refuse_blind_images(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | list | None,
        past: int | torch.Tensor,
        image_positions: torch.Tensor | None,
    ) -> None:
        """A prompt with image tokens and no image would be answered without looking: an error instead."""
        if pixel_values is not None or image_features is not None or isinstance(past, torch.Tensor) or past > 0:
            return
        if torch.compiler.is_compiling() or input_ids.device.type == "meta":
            return
        if image_positions is not None:
            blind = image_positions.shape[0] > 0
        else:
            blind = bool(image_mask(input_ids, self.config.image_token_id).any())
        if blind:
            raise ValueError(
                "input_ids hold image tokens, but no pixel_values were given: the model would answer blindly"
            )


class Phi3VForCausalLM(Phi3VPreTrainedModel, Phi3VGenerationMixin, GenerationMixin):
    """Phi-3-Vision with its language model head: answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | list, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `Phi3VModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list | None = None,
        image_features: torch.Tensor | list | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        trained_logits_only: bool = False,
        trained_positions: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        global_views: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        r"""Runs the model.

        Args:
            input_ids: `[B, S]`; image tokens are `config.image_token_id`, in the order of the images, or Microsoft's
                negative ids, where -k is image k of its row.
            attention_mask: `[B, S]`, 0 at padding, on either side.
            position_ids: `[B, S]`; without them padding is not counted.
            past_key_values: keys and values of earlier positions.
            inputs_embeds: `[B, S, H]` instead of `input_ids`; images are then already in it.
            pixel_values: `[images, crops, 3, 336, 336]`, the images of row 0 first, then those of row 1; or one of the
                other forms of `crops_phi3_v`: flat, or sub crops as bytes beside `global_views`. Beside a cache they
                are ignored where `input_ids` hold no image token.
            image_sizes: `[images, 2]`, canvas height and width in pixels.
            image_features: `[T, H]` instead of `pixel_values`: what `get_image_features` returned as
                `last_hidden_state`. Or a list, where some images have features and the others pixels: see
                `Phi3VModel.fill_features`.
            labels: `[B, S]`, -100 where nothing is learned; image tokens are never learned, nor is a token behind
                padding. The loss is the mean over the rest, or their sum divided by `num_items_in_batch`.
            use_cache: whether keys and values are returned.
            logits_to_keep: compute logits for the last so many positions only (0: all).
            trained_logits_only: compute logits only where a label asks for them; `logits` are then
                `[trained tokens, vocabulary]`. (An argument with "label" in its name would be taken for labels by
                transformers' Trainer.)
            **kwargs: to the attention; for a row of several samples `cu_seqlens` and `max_seqlen`, see
                `kernels.packed_attention`. Its `position_ids` restart at 0 and it has no mask.
            trained_positions: flat positions `[K]`, `row * S + column`, whose logits are compared with the label behind
                them, as `data.step_batch` makes them; `logits` are then `[K, vocabulary]`, and the last layer works
                there alone. For a training step, and for prompts beside an empty cache: rows begin in column 0 and are
                padded on the right, `labels` are taken as they are or left out, `attention_mask` is left out.
            image_positions: flat positions `[T]` of the image tokens; images are then placed there, in the order of the
                text, without a look at `input_ids`.
            global_views: `[images, 3, 336, 336]`, where `pixel_values` are bytes.

        Example: with `labels=[[-100, -100, 7, 8]]` and `trained_logits_only=True` the logits are those of positions 1
        and 2, which predict 7 and 8.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_features=image_features,
            use_cache=use_cache,
            trained_positions=trained_positions,
            image_positions=image_positions,
            global_views=global_views,
            **(kwargs if trained_positions is None else without_loss(kwargs)),
        )
        hidden_states = outputs.last_hidden_state
        if trained_positions is not None:
            return self._step_output(outputs, labels, trained_positions, kwargs.get("num_items_in_batch"))
        if labels is not None:  # collators of other libraries copy all ids
            labels = labels.masked_fill(image_mask(labels, self.config.image_token_id), -100)
            labels = without_first_tokens(labels, attention_mask)
        if trained_logits_only:
            if labels is None:
                raise ValueError("trained_logits_only needs labels")
            targets = labels[:, 1:]
            trained = targets != -100
            logits = self.lm_head(hidden_states[:, :-1][trained])
            loss = self._loss_at_labels(logits, targets[trained], kwargs.get("num_items_in_batch"))
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep, :])
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _step_output(
        self,
        outputs: BaseModelOutputWithPast,
        labels: torch.Tensor | None,
        positions: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> CausalLMOutputWithPast:
        """Logits `[K, vocabulary]` at flat positions `[K]`, and their loss where there are labels."""
        logits, loss = self.lm_head(outputs.last_hidden_state[0]), None
        if labels is not None:
            loss = self._loss_at_labels(logits, labels.flatten().index_select(0, positions + 1), num_items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    @staticmethod
    def _loss_at_labels(
        logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        total = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")
        if num_items is None:
            return total / max(targets.numel(), 1)
        return total / (num_items.to(total.device) if isinstance(num_items, torch.Tensor) else num_items)


def without_first_tokens(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Labels `[B, S]` without those behind padding: the first token of a row alone is predicted from nothing either.

    Example: labels `[[-100, -100, 1, 7]]` under the mask `[[0, 0, 1, 1]]` give `[[-100, -100, -100, 7]]`.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return labels
    behind_padding = attention_mask[:, -labels.shape[1] :][:, :-1] == 0
    return labels.masked_fill(nn.functional.pad(behind_padding, (1, 0)).to(labels.device), -100)


def without_loss(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `forward` without that of the loss: a number of each step's own would compile layers again."""
    return {name: value for name, value in arguments.items() if name != "num_items_in_batch"}


__all__ = ["Phi3VForCausalLM", "Phi3VModel", "Phi3VPreTrainedModel"]
