"""The recipe's section `vision`: what happens to the parts that see, and where what they make of images is kept.

Plain values and their limits; the features themselves are the business of the package `features`.
"""

from typing import Literal

from pydantic import Field

from phi3v.recipe_data import Section


class VisionSection(Section):
    """What happens to the parts that see."""

    tower: Literal["frozen", "lora", "train"] = Field(default="frozen", description="The CLIP tower.")
    projector: Literal["frozen", "lora", "train"] = Field(
        default="frozen", description="img_projection and the separators sub_GN and glb_GN."
    )
    tower_learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Peak rate of the tower; null for that of training."
    )
    projector_learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Peak rate of the projector; null for that of training."
    )
    cache: Literal["memory", "disk"] | None = Field(
        default=None, description="Where features of frozen vision parts are kept: memory, disk; null: nowhere."
    )
    cache_gb: float = Field(
        default=4.0, gt=0, allow_inf_nan=False, description="Most that they may take in 10^9 bytes; more are not kept."
    )
    cache_folder: str | None = Field(
        default=None, description="Folder of features on disk; null for phi3v/features in the user's cache folder."
    )

    @property
    def frozen(self) -> bool:
        """Whether nothing of the parts that see is trained."""
        return self.tower == self.projector == "frozen"

    @property
    def learning_rates(self) -> dict[str, float]:
        """Parts of the model with a rate of their own: {"projector": 1e-5}."""
        rates = {"vision tower": self.tower_learning_rate, "projector": self.projector_learning_rate}
        return {part: rate for part, rate in rates.items() if rate is not None}
