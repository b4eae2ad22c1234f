"""What tests of this package, and of what is built on it, need instead of mocks: toy models, stores' contract."""

from edit_ray.testing.stores import check_store
from edit_ray.testing.wan import (
    END,
    PAD,
    TEXT_DIM,
    UNKNOWN,
    WORDS,
    Z_DIM,
    random_vae,
    save_random_wan,
    word_tokenizer,
)

__all__ = [
    "END",
    "PAD",
    "TEXT_DIM",
    "UNKNOWN",
    "WORDS",
    "Z_DIM",
    "check_store",
    "random_vae",
    "save_random_wan",
    "word_tokenizer",
]
