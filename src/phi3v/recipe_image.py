"""The recipe's section `image`: how images are seen, and how training changes them.

Plain values and their limits; what is done with them is the business of the processor and of `data.augment`.
"""

from typing import Annotated, Any

from pydantic import Field

from phi3v.recipe_data import Section

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""From 0 to below 1."""


class AugmentSection(Section):
    """How much each training image is changed at random, anew in each epoch; held-out images stay as they are."""

    crop: Share = Field(default=0.0, description="Share of each side that is cut off at most.")
    rotate: float = Field(default=0.0, ge=0, le=180, allow_inf_nan=False, description="Degrees at most, either way.")
    brightness: Share = Field(default=0.0, description="0.2 is a factor of 0.8 to 1.2.")
    contrast: Share = Field(default=0.0, description="The same.")
    saturation: Share = Field(default=0.0, description="The same.")
    mirror: float = Field(
        default=0.0, ge=0, le=1, allow_inf_nan=False, description="Probability of left and right swapped; ruins texts."
    )


class ImageSection(Section):
    """How images are seen."""

    num_crops: int | None = Field(
        default=None, ge=1, description="Most 336-pixel crops of one image; null takes the model's own (16 or 4)."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=313,
        le=131_072,  # the context of the models; crops, and pixels with them, grow with the budget
        description="Most tokens of one image: as many crops as never cost more, instead of the model's own number.",
    )
    max_pixels: int = Field(default=20_000_000, ge=1, description="Larger images are refused before they are decoded.")
    fast: bool = Field(default=False, description="true: faster decoding and resizing, within one grey level.")
    augment: AugmentSection | None = Field(default=None, description="Random changes of training images; null: none.")

    @property
    def processor_options(self) -> dict[str, Any]:
        """The arguments of loading.load_processor by name."""
        return {"num_crops": self.num_crops, "max_image_tokens": self.max_tokens, "fast": self.fast}

    @property
    def augments(self) -> dict[str, float]:
        """The changes that are wanted, by name: {"crop": 0.1}; none without `augment` or where all of it is 0."""
        return {} if self.augment is None else {name: value for name, value in self.augment if value}
