"""The decoder's graph with its cache of keys and values, written by onnxruntime-genai's own builder.

In come a folder of merged weights and an empty one, out go `model.onnx` and what the builder says of it. The builder
reads checkpoints of transformers' Phi-3, so the merged one is given such a config, with which it loads; it runs as a
process of its own, for it prints, and its memory goes with it. Where we are killed, it and both folders go too, see
`beside`. Knows nothing of images.
"""

import json
from pathlib import Path
from typing import Any

from transformers import Phi3Config

from phi3v.errors import ConfigError
from phi3v.export.beside import run_beside
from phi3v.model.rope_phi3_v import Phi3VRotaryEmbedding

DECODER = "model.onnx"
GENAI_CONFIG = "genai_config.json"
SAME_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings original_max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id "
    "eos_token_id pad_token_id"
).split()
HEAD_STEP = 16


def check_decoder(config: Any) -> None:
    """Raises: ConfigError for a decoder whose attention the graph does not have."""
    head = config.hidden_size // config.num_attention_heads
    if head % HEAD_STEP:
        raise ConfigError(
            f"the decoder's heads are {head} wide (hidden_size / num_attention_heads), and ONNX Runtime's attention "
            f"takes multiples of {HEAD_STEP}: export it as --to merged"
        )
    if config.sliding_window is not None:
        raise ConfigError(
            f"the decoder looks back {config.sliding_window} tokens alone (sliding_window), and the graph looks at all "
            "of them: export it as --to merged"
        )


def read_as_phi3(config: Any, merged: Path) -> None:
    """Makes a merged Phi-3-V a checkpoint of transformers' Phi-3, whose names of weights are the same, by its config.

    The builder asks for rope settings in the words of older files, and for the factor on cosine and sine.
    """
    rope = {**config.rope_parameters, "type": config.rope_parameters["rope_type"]}
    if rope["type"] == "longrope":
        rope["short_mscale"] = rope["long_mscale"] = float(Phi3VRotaryEmbedding(config).attention_scaling)
    fields = {name: getattr(config, name) for name in SAME_FIELDS}
    text = Phi3Config(**fields, rope_parameters=dict(config.rope_parameters), sliding_window=None)
    values = {**text.to_dict(), "rope_parameters": rope, "architectures": ["Phi3ForCausalLM"], "dtype": "float32"}
    (merged / "config.json").write_text(json.dumps(values), encoding="utf-8")


def build_decoder(config: Any, merged: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Runs the builder on a merged model inside `folder`, and gives what its genai_config.json said.

    Raises: ConfigError with the last line that the builder said, where it fails.
    """
    read_as_phi3(config, merged)
    written = [""]

    def take_configs() -> None:
        """With the one the decoder loads, with the other the language model: gone while a kill still removes all."""
        if (folder / GENAI_CONFIG).is_file():
            written.append((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
        for file in (folder / GENAI_CONFIG, merged / "config.json"):
            file.unlink(missing_ok=True)

    words = ["-i", merged, "-o", folder, "-p", precision, "-e", "cpu", "-c", merged / "cache"]
    options = ["--extra_options", "exclude_embeds=true", "hf_token=false"]
    module, offline = "onnxruntime_genai.models.builder", {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = run_beside(module, [*map(str, words), *options], removing=folder, afterwards=take_configs, **offline)
    if done.returncode or not written[-1] or not (folder / DECODER).is_file():
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        raise ConfigError(
            f"onnxruntime-genai's builder could not make the decoder (exit code {done.returncode}): {said[-1]}"
        )
    forget_commit(folder / DECODER)
    built: dict[str, Any] = json.loads(written[-1])
    return built


def forget_commit(graph: Path) -> None:
    """Takes out of a graph the commit that the builder puts behind its version: "0.18.0+275d393" -> "0.18.0".

    It is of the repository that the builder's own files lie in, which is the user's where the virtual environment lies
    in one: it would be published with the graph, and equal exports would differ. Weights are not read: they stay in
    the file beside the graph.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    onnx.save(model, graph)
