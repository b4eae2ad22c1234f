"""When to recompute: one module per technique. Importing the package registers them all."""

from edit_ray.cache.policies.dicache import DiCache
from edit_ray.cache.policies.dmd import DynamicModes
from edit_ray.cache.policies.easycache import EasyCache
from edit_ray.cache.policies.estimates import relative_l1
from edit_ray.cache.policies.fbcache import FirstBlockCache
from edit_ray.cache.policies.foca import FoCa
from edit_ray.cache.policies.lemica import LeMiCa
from edit_ray.cache.policies.magcache import MagCache
from edit_ray.cache.policies.option_types import OptionError
from edit_ray.cache.policies.policy import (
    POLICIES,
    CachePolicy,
    PolicyContext,
    check_granularity,
    make_policy,
    register_policy,
)
from edit_ray.cache.policies.schedule import Always, Ranked, Schedule
from edit_ray.cache.policies.seacache import SeaCache
from edit_ray.cache.policies.spectrum import Spectrum
from edit_ray.cache.policies.taylorseer import TaylorSeer
from edit_ray.cache.policies.teacache import TeaCache
from edit_ray.cache.policies.warmstart_reuse import WarmstartReuse

__all__ = [
    "POLICIES",
    "Always",
    "CachePolicy",
    "DiCache",
    "DynamicModes",
    "EasyCache",
    "FirstBlockCache",
    "FoCa",
    "LeMiCa",
    "MagCache",
    "OptionError",
    "PolicyContext",
    "Ranked",
    "Schedule",
    "SeaCache",
    "Spectrum",
    "TaylorSeer",
    "TeaCache",
    "WarmstartReuse",
    "check_granularity",
    "make_policy",
    "register_policy",
    "relative_l1",
]
