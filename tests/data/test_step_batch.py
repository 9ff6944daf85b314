"""A step's batch: positions instead of masks, numbers instead of tensors."""

import inspect

import pytest
import torch

from phi3v.data.collate import Collator
from phi3v.data.step_batch import step_batch
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM


def plain() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[1, 9, 9, 5, 6], [1, 7, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 5, 6], [-100, 7, -100, -100, -100]]),
    }


def test_positions_are_flat_and_padding_repeats_the_last_one() -> None:
    made = step_batch(plain(), 9)
    assert {key: made[key].tolist() for key in ("trained_positions", "image_positions", "position_ids")} == {
        "trained_positions": [2, 3, 5],
        "image_positions": [1, 2],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 1, 1, 1]],
    }
    assert "attention_mask" not in made


def test_packed_rows_keep_their_positions_and_what_the_attention_needs() -> None:
    packed = {
        "input_ids": torch.tensor([[1, 5, 6, 1, 7]]),
        "labels": torch.tensor([[-100, -100, 6, -100, 7]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
        "max_seqlen": 3,
    }
    made = step_batch(packed, 9)
    assert made["trained_positions"].tolist() == [1, 3] and made["max_seqlen"] == 3
    assert made["position_ids"] is packed["position_ids"] and made["cu_seqlens"] is packed["cu_seqlens"]


def test_rows_padded_on_the_left_are_refused() -> None:
    batch = plain() | {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])}
    with pytest.raises(AssertionError, match="on the right"):
        step_batch(batch, 9)


def test_the_given_batch_stays_as_it_was() -> None:
    batch = plain()
    step_batch(batch, 9)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_the_collator_makes_it_and_its_keys_are_forwards() -> None:
    examples = [
        {
            "input_ids": torch.tensor([1, 9, 5]),
            "labels": torch.tensor([-100, -100, 5]),
            "pixel_values": torch.zeros(1, 3, 3, 2, 2),
            "image_sizes": torch.tensor([[2, 4]]),
        },
        {"input_ids": torch.tensor([1, 5]), "labels": torch.tensor([-100, 5])},
    ]
    batch = Collator(0, image_token_id=9)(examples)
    assert batch["image_sizes"] == [[2, 4]] and batch["trained_positions"].tolist() == [1, 3]
    assert set(batch) <= set(inspect.signature(Phi3VForCausalLM.forward).parameters)


def test_no_crop_stands_for_nothing() -> None:
    """Floats of images with 1 and 4 crops, and bytes of them."""

    def example(crops: int, size: list[int], in_bytes: bool) -> dict[str, torch.Tensor]:
        values = torch.full((crops, 3, 2, 2), crops, dtype=torch.uint8)
        made = {"input_ids": torch.tensor([9, 5]), "labels": torch.tensor([-100, 5])}
        made["image_sizes"] = torch.tensor([size])
        if in_bytes:
            return {**made, "pixel_values": values, "global_views": torch.full((1, 3, 2, 2), 0.5)}
        spare = torch.full((1, 3, 2, 2), 77.0)
        return {**made, "pixel_values": torch.cat([torch.full((1, 3, 2, 2), 0.5), values.float(), spare])[None]}

    sizes = [(1, [2, 2]), (4, [4, 4])]
    floats = Collator(0, image_token_id=9)([example(*one, in_bytes=False) for one in sizes])
    assert floats["pixel_values"][:, 0, 0, 0].tolist() == [0.5, 1, 0.5, 4, 4, 4, 4]
    in_bytes = Collator(0, image_token_id=9)([example(*one, in_bytes=True) for one in sizes])
    assert in_bytes["pixel_values"].dtype == torch.uint8 and in_bytes["global_views"].shape[0] == 2
    assert in_bytes["pixel_values"][:, 0, 0, 0].tolist() == [1, 4, 4, 4, 4]
