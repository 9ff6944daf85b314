"""A small tokenizer that behaves as Phi-3's: same added tokens, flags and pipeline, a vocabulary of a few hundred
entries.

Characters it does not know become bytes, and a few words are merged, so that tests meet both. Built in memory; what
only the real vocabulary can show is tested with the hub's files.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("the", "what", "is", "this", "image", "in", "end", "user", "assistant", "digit", "unk", "answer")
PLACEHOLDERS = [f"<|placeholder{number}|>" for number in range(1, 40)]
CONTROL = ("<|endoftext|>", "<|system|>", "<|end|>", "<|user|>")
RSTRIP = ("</s>", "<|assistant|>", "<|image|>", *PLACEHOLDERS)
ADDED_AFTER_BASE = (
    *("<|endoftext|>", "<|assistant|>", *PLACEHOLDERS[:4], "<|system|>", "<|end|>", *PLACEHOLDERS[4:6], "<|user|>"),
    *(*PLACEHOLDERS[6:], "<|image|>"),
)
"""In the order of the real ids 32000..32044."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; ids 0, 1, 2 are `<unk>`, `<s>`, `</s>` as in the real one, `<|image|>` is the last."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(0x21, 0x7F)] + list("éß中文")
    merges = []
    for word in [*WORDS, *("▁" + word for word in WORDS)]:
        for length in range(2, len(word) + 1):
            if word[:length] not in tokens:
                tokens.append(word[:length])
                merges.append((word[: length - 1], word[length - 1]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in ("<unk>", "<s>", "</s>", *ADDED_AFTER_BASE):
        special = token != "</s>"
        added = AddedToken(token, rstrip=token in RSTRIP, normalized=False, special=special)
        (backend.add_special_tokens if special else backend.add_tokens)([added])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=131072,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
