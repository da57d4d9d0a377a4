"""What the kernels of a step do, by their names."""

import re

REST = "other"
KINDS = ("products", "convolutions", "attention", "norms", "copies", REST)

_WORDS = {
    REST: r"^triton_(poi|for)",  # Inductor names what it fuses by all that it comes from
    "norms": r"^triton_(red|per)|norm",
    "copies": r"memset|memcpy",
    "attention": r"sdpa|flash|fmha|attend|attention",
    "convolutions": r"fprop|conv|cudnn",
    "products": r"gemm|gemv|cutlass|nvjet|splitk|geglu|grouped_linear|^aten::(add)?b?mm|triton_tem",
}
"""The first that is found in a name says what it is: cuDNN's convolutions are gemms, too."""


def kind_of(name: str) -> str:
    """One of KINDS, of a kernel's name; on a CPU of an operator's."""
    lower = name.lower()
    return next((kind for kind, words in _WORDS.items() if re.search(words, lower)), REST)
