"""The decoder's graph with its cache of keys and values, written by onnxruntime-genai's own builder.

In come a merged model and a folder, out go `model.onnx` and a first `genai_config.json`. The builder reads a checkpoint
of transformers' Phi-3, so one is written beside and removed again, and it runs as a process of its own: it prints, and
its memory goes with it. Knows nothing of images.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3v.errors import ConfigError

DECODER = "model.onnx"
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


def write_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """The decoder of a Phi-3-V as a checkpoint of transformers' Phi-3, whose names are the same.

    The builder asks for rope settings in the words of older files, and for the factor on cosine and sine.
    """
    config = model.config
    rope = {**config.rope_parameters, "type": config.rope_parameters["rope_type"]}
    if rope["type"] == "longrope":
        rope["short_mscale"] = rope["long_mscale"] = float(model.model.rotary_emb.attention_scaling)
    text = Phi3Config(
        **{name: getattr(config, name) for name in SAME_FIELDS},
        rope_parameters=dict(config.rope_parameters),
        sliding_window=None,
    )
    with torch.device("meta"):
        decoder = Phi3ForCausalLM(text)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".vision_embed_tokens." not in name}
    decoder.load_state_dict(state, assign=True)
    decoder.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    tokenizer.save_pretrained(folder)


def build_decoder(checkpoint: Path, folder: Path, precision: str) -> None:
    """Runs the builder on a checkpoint, which is removed.

    Raises: ConfigError with the last line that the builder said, where it fails.
    """
    cache = checkpoint / "cache"
    words = ["-i", checkpoint, "-o", folder, "-p", precision, "-e", "cpu", "-c", cache]
    options = ["--extra_options", "exclude_embeds=true", "hf_token=false"]
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", *map(str, words), *options]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
    )
    shutil.rmtree(checkpoint)
    if done.returncode or not (folder / DECODER).is_file():
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        raise ConfigError(
            f"onnxruntime-genai's builder could not make the decoder (exit code {done.returncode}): {said[-1]}"
        )
