"""What tests of this package, and of what is built on it, need instead of mocks: toy models, stores' contract."""

from edit_ray.testing.made_model import make_model, meta_transformer, random_transformer
from edit_ray.testing.random_weights import fill_random
from edit_ray.testing.stores import check_store
from edit_ray.testing.variants import VARIANTS, Variant
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
    "VARIANTS",
    "WORDS",
    "Z_DIM",
    "Variant",
    "check_store",
    "fill_random",
    "make_model",
    "meta_transformer",
    "random_transformer",
    "random_vae",
    "save_random_wan",
    "word_tokenizer",
]
