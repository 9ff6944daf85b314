"""Batches: padding on either side, images in row order, and keys that `forward` knows."""

import inspect

import pytest
import torch

from phi3v.data.collate import Collator, PackedCollator, StepCollator, join_images
from phi3v.data.plan import MicroBatches
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM


def example(ids: list[int], *grids: tuple[int, int], labels: bool = True) -> dict[str, torch.Tensor]:
    """An example whose pixels are the running number of the crop; two pixels a side are enough here."""
    made = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
    if labels:
        made["labels"] = torch.tensor([-100, *ids[1:]])
    if grids:
        slots = max(h * w for h, w in grids) + 1
        made["pixel_values"] = (
            torch.arange(1.0, len(grids) * slots + 1).view(-1, slots, 1, 1, 1).expand(-1, -1, 3, 2, 2)
        )
        made["image_sizes"] = torch.tensor([[2 * h, 2 * w] for h, w in grids])
    return made


def test_rows_are_padded_on_the_right_for_training() -> None:
    batch = Collator(pad_token_id=9)([example([5, 6, 7]), example([8])])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
    }


def test_rows_are_padded_on_the_left_for_generation() -> None:
    batch = Collator(pad_token_id=9, padding_side="left")(
        [example([5, 6, 7], labels=False), example([8], labels=False)]
    )
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [9, 9, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
    }


def test_a_missing_mask_is_ones() -> None:
    batch = Collator(pad_token_id=9)([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([8])}])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_images_follow_the_rows_with_the_most_crops() -> None:
    rows = [example([1, 2], (1, 1)), example([3]), example([4], (2, 2), (1, 2))]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["pixel_values"].shape == (3, 5, 3, 2, 2)
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert batch["image_sizes"].tolist() == [[2, 2], [4, 4], [2, 4]]


def test_text_alone_carries_no_images() -> None:
    assert set(Collator(pad_token_id=0)([example([1]), example([2, 3])])) == {"input_ids", "attention_mask", "labels"}


def test_labels_are_in_all_examples_or_in_none() -> None:
    with pytest.raises(KeyError):
        Collator(pad_token_id=0)([example([1]), example([2], labels=False)])


def test_the_examples_stay_as_they_were() -> None:
    rows = [example([1, 2], (1, 1)), example([4], (2, 2))]
    copies = [{key: value.clone() for key, value in row.items()} for row in rows]
    Collator(pad_token_id=0)(rows)
    assert all(torch.equal(row[key], copy[key]) for row, copy in zip(rows, copies, strict=True) for key in copy)


def test_joining_keeps_the_number_type() -> None:
    parts = [torch.ones(1, 2, 3, 2, 2, dtype=torch.bfloat16), torch.ones(2, 3, 3, 2, 2, dtype=torch.bfloat16)]
    joined = join_images(parts)
    assert (joined.dtype, joined.shape) == (torch.bfloat16, (3, 3, 3, 2, 2)) and joined.sum() == (2 + 6) * 12


def test_keys_are_arguments_of_forward() -> None:
    batch = Collator(pad_token_id=0)([example([1, 2], (1, 1))])
    assert set(batch) <= set(inspect.signature(Phi3VForCausalLM.forward).parameters)


def test_a_pack_is_one_row_without_padding() -> None:
    batch = PackedCollator()([example([5, 6, 7], (1, 1)), example([8]), example([9, 4], (1, 2))])
    longest = batch.pop("max_seqlen")
    assert longest == 3 and batch["cu_seqlens"].dtype == torch.int32
    assert {key: value.tolist() for key, value in batch.items() if not key.startswith("pixel")} == {
        "input_ids": [[5, 6, 7, 8, 9, 4]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "labels": [[-100, 6, 7, -100, -100, 4]],
        "cu_seqlens": [0, 3, 4, 6],
        "image_sizes": [[2, 2], [2, 4]],
    }
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[1, 2, 0], [1, 2, 3]]


def test_nothing_is_learned_across_a_border() -> None:
    """Labels that a collator of another library copied whole: the first token of a sample has no one before it."""
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6], [7, 8])]
    copies = [row["labels"].clone() for row in rows]
    assert PackedCollator()(rows)["labels"].tolist() == [[-100, 6, -100, 8]]
    assert all(torch.equal(row["labels"], copy) for row, copy in zip(rows, copies, strict=True))


def test_a_step_is_the_list_of_its_micro_batches() -> None:
    rows = [example([1] * length) for length in (6, 5, 4, 3)]
    packs = StepCollator(PackedCollator(), MicroBatches(1, tokens=10))(rows)
    assert [pack["cu_seqlens"].tolist() for pack in packs] == [[0, 6, 9], [0, 5, 9]]
    padded = StepCollator(Collator(0), MicroBatches(2, packed=False))(rows)
    assert [batch["input_ids"].shape for batch in padded] == [(2, 6), (2, 4)]


def test_packs_follow_from_the_samples_that_came() -> None:
    """A longer row stands in for one that did not decode: another pack, no sample lost, the budget kept."""
    planned, came = [6, 4, 5, 5], [6, 9, 5, 5]
    how = MicroBatches(1, tokens=10)
    assert len(how.groups(planned)) == 2
    packs = StepCollator(PackedCollator(), how)([example([1] * length) for length in came])
    assert [pack["cu_seqlens"].diff().tolist() for pack in packs] == [[5, 5], [9], [6]]
