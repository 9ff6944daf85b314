"""phi3v: tune Microsoft's Phi-3-Vision and Phi-3.5-Vision to your own images.

The public interface is `Recipe`, `train`, `evaluate`, `compare`, `predict`, `ask`, `ChatModel`, `FeatureMemory` and
`register`.
Importing the package is light: a name is loaded when it is first used, so that `import phi3v` needs neither torch nor
transformers.

Example:
    import phi3v

    recipe = phi3v.Recipe.load("recipes/demo.yaml", ["training.learning_rate=1e-4"])
    phi3v.train(recipe)
    print(phi3v.ask("runs/demo_by_hand", "photo.jpg", "What is shown in this image?"))
"""

from importlib import import_module

TYPE_CHECKING = False  # typing's own takes longer than all of this, and Ctrl-C meanwhile would show a traceback
if TYPE_CHECKING:
    from typing import Any

    from phi3v.evaluation.compare import compare
    from phi3v.evaluation.predict import predict
    from phi3v.evaluation.run import evaluate
    from phi3v.features.store import FeatureMemory
    from phi3v.generate import ChatModel, ask
    from phi3v.model.register import register
    from phi3v.recipe import Recipe
    from phi3v.training.train import train

__version__ = "0.1.0"
__all__ = [
    "ChatModel",
    "FeatureMemory",
    "Recipe",
    "__version__",
    "ask",
    "compare",
    "evaluate",
    "predict",
    "register",
    "train",
]

_HOME = {
    "ChatModel": "phi3v.generate",
    "FeatureMemory": "phi3v.features.store",
    "Recipe": "phi3v.recipe",
    "ask": "phi3v.generate",
    "compare": "phi3v.evaluation.compare",
    "evaluate": "phi3v.evaluation.run",
    "predict": "phi3v.evaluation.predict",
    "register": "phi3v.model.register",
    "train": "phi3v.training.train",
}


def __getattr__(name: str) -> "Any":
    """Load a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'phi3v' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
