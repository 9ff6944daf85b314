"""Pages and their labels: the same everywhere, at the cells where the words are drawn, and learned from."""

from pathlib import Path

import pytest
import torch

from phi3v.demo import catalogue, looking, pretrain
from phi3v.demo.looking import CELLS, NOTHING, WORDS, page
from phi3v.demo.scenes import SHAPES, SIDE

MANY = 80


def test_a_page_is_made_of_its_numbers_alone() -> None:
    first, second = page(3, 5), page(3, 5)
    assert first[1] == second[1]
    assert first[0].tobytes() == second[0].tobytes()
    assert first[0].size == (SIDE, SIDE)
    assert page(4, 5)[0].tobytes() != first[0].tobytes()


def test_pages_hold_every_word() -> None:
    seen = {label for index in range(400) for label in page(0, index)[1]}
    assert seen == {-100, *range(len(WORDS))}
    assert WORDS[1:] == (*"0123456789", *SHAPES)


def test_plates_hold_no_number_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(looking.glyphs, "paste_plate", lambda image, text, *rest: drawn.append(text))
    for index in range(200):
        page(0, index)
    assert len(drawn) > 500 and {len(text) for text in drawn} == {1, 2, 3, 4, 5, 6}
    prices = {str(price) for part in ("train", "test") for price in catalogue.prices(part)}
    assert not prices & set(drawn)


def test_labels_stand_where_something_is_drawn() -> None:
    """Around an empty cell's middle all pixels are alike; a plate's cell holds ink and paper."""
    for index in range(MANY):
        image, labels = page(1, index)
        digits = [cell for cell, label in enumerate(labels) if 1 <= label <= 10]
        if not digits or len(set(labels)) < 4:  # only pages of plates
            continue
        for cell, label in enumerate(labels):
            x, y = cell % CELLS * 28, cell // CELLS * 28
            colours = image.crop((x + 9, y + 9, x + 19, y + 19)).getcolors()
            assert colours is not None
            if label == WORDS.index(NOTHING):
                assert len(colours) == 1, (index, cell)
        assert all(
            len(
                image.crop((c % CELLS * 28, c // CELLS * 28, c % CELLS * 28 + 28, c // CELLS * 28 + 28)).getcolors()
                or []
            )
            > 1
            for c in digits
        )


def test_every_word_has_a_token_of_its_own(tmp_path: Path) -> None:
    tokenizer = pretrain.new_processor(tmp_path).tokenizer
    ids = looking.word_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[:3]) == ["▁", "0", "1"]
    assert len(set(ids)) == len(WORDS)


def test_two_words_with_one_token_are_refused() -> None:
    with pytest.raises(ValueError, match="end with the same token"):
        looking.word_ids(lambda text: {"input_ids": [7]})


def test_the_loss_reaches_the_tower_and_falls(tmp_path: Path) -> None:
    processor = pretrain.new_processor(tmp_path)
    model = pretrain.new_model(0).train()
    names = looking.word_ids(processor.tokenizer)
    views, labels = pretrain.collate_pages([page(2, index) for index in range(4)])
    assert views.shape == (4, 3, SIDE, SIDE) and labels.shape == (4, CELLS * CELLS)
    groups = pretrain.optimisers(model, 1e-3)
    losses = []
    for _ in range(6):
        loss = looking.looking_loss(model, views, labels, names)
        losses.append(loss.item())
        loss.backward()
        for optimiser in groups:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    assert losses[-1] < 0.95 * losses[0]
    first = model.model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding.weight
    assert not torch.equal(first, dict(pretrain.new_model(0).named_parameters())[_name(model, first)])


def _name(model: torch.nn.Module, parameter: torch.Tensor) -> str:
    return next(name for name, value in model.named_parameters() if value is parameter)


def test_the_loss_is_the_mean_over_words_plus_the_mean_over_nothing(tmp_path: Path) -> None:
    model = pretrain.new_model(0).eval()
    names = looking.word_ids(pretrain.new_processor(tmp_path).tokenizer)
    views, labels = pretrain.collate_pages([page(2, 0)])
    words, empty = labels.clone(), labels.clone()
    words[labels == 0] = -100
    empty[labels != 0] = -100
    with torch.no_grad():
        parts = [looking.looking_loss(model, views, part, names) for part in (words, empty)]
        torch.testing.assert_close(looking.looking_loss(model, views, labels, names), parts[0] + parts[1])
