"""What tests of this package, and of programs built on it, need instead of mocks: toy models, a store's contract."""

from edit_ray.testing.made_model import VARIANTS, Variant, fill_random, make_model, meta_transformer, random_transformer
from edit_ray.testing.stores import check_store
from edit_ray.testing.wan import WORDS, random_vae, save_random_wan

__all__ = [
    "VARIANTS",
    "WORDS",
    "Variant",
    "check_store",
    "fill_random",
    "make_model",
    "meta_transformer",
    "random_transformer",
    "random_vae",
    "save_random_wan",
]
