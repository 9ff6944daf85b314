"""The names that people import, and the names of their arguments. Changing one here is breaking someone's program."""

import inspect
import subprocess
import sys

import pytest

import phi3v

SIGNATURES = {
    "Recipe.load": ["path", "overrides", "name"],
    "Recipe.from_dict": ["values", "overrides", "name"],
    "Recipe.with_overrides": ["self", "overrides"],
    "Recipe.to_yaml": ["self"],
    "train": ["recipe", "on_event", "features", "report"],
    "evaluate": [
        *["target", "data", "against", "metrics", "checks"],
        *["rows", "out", "device", "on_progress", "features", "ranks", "overrides", "lock"],
    ],
    "compare": ["runs", "out"],
    "predict": [
        "target",
        "data",
        "out",
        "prompt",
        "rows",
        "batch_size",
        "max_new_tokens",
        "device",
        "max_pixels",
        "on_progress",
        "features",
        "ranks",
        "overrides",
    ],
    "ask": ["target", "images", "question", "device", "max_pixels", "options"],
    "register": [],
    "ChatModel": ["model", "processor", "system", "max_pixels"],
    "ChatModel.from_target": ["target", "max_pixels", "options"],
    "ChatModel.ask": ["self", "images", "question", "system", "max_new_tokens", "stream", "generation"],
    "FeatureMemory": ["limit_bytes"],
    "ChatModel.answer": ["self", "conversations", "batch_size", "max_new_tokens", "generation"],
}


def test_public_names_are_frozen():
    assert phi3v.__all__ == [
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
    assert set(phi3v.__all__) <= set(dir(phi3v))


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_frozen(name):
    found = phi3v
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters) == SIGNATURES[name]


def test_unknown_names_say_what_there_is():
    with pytest.raises(AttributeError, match="'evalute'; it offers .*evaluate"):
        phi3v.evalute  # noqa: B018


def test_the_package_is_light_until_a_name_is_used():
    program = (
        "import sys, phi3v\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "phi3v.Recipe\nassert 'pydantic' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from phi3v import ChatModel, ask, evaluate, train

    assert all(map(callable, (ChatModel, ask, evaluate, train)))
