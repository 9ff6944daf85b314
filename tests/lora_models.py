"""Small Phi-3 decoders with LoRA for tests of the hand-written layer: the same weights twice, plain and fast."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def small_decoder(*, layers: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Phi3ForCausalLM:
    """Three layers of width 48, 4 query heads, 2 key heads, MLP of width 80; weights drawn with seed 0."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    names = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
    config = Phi3Config(**{**sizes, **names, "num_hidden_layers": layers, "attn_implementation": "sdpa", **changes})
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "embed" not in name:
                weight.normal_(std=0.7 * weight.shape[1] ** -0.5)
    return model


def with_lora(model: torch.nn.Module, **options: Any) -> Any:
    """The model under LoRA whose B is not zero, so that every gradient is alive; seed 1."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return tuned.train()


def twice(dtype: torch.dtype = torch.float32, sizes: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """The same tuned decoder two times, with separate weights."""
    plain = with_lora(small_decoder(dtype=dtype, **(sizes or {})), **options)
    return plain, copy.deepcopy(plain)


def loss_and_gradients(model: Any, embeddings: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    """A loss that weighs all outputs, its gradient at the input, and that of every trained weight, by name."""
    embeddings = embeddings.clone().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    hidden = model.base_model.model.model(inputs_embeds=embeddings, use_cache=False, **inputs).last_hidden_state
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape).to(hidden)
    loss = (hidden * weights).sum()
    loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"output": hidden.detach(), "input": embeddings.grad, **trained}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected, over the whole tensor."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
