"""Configurations: from YAML and options to a frozen model, or to every mistake at once."""

from edit_ray.config.load import config_of, load_config, output_root
from edit_ray.config.model import Config, PromptSegment, VideoOptions, dump_yaml
from edit_ray.config.model_checks import check_config, check_texts, read_edit

__all__ = [
    "Config",
    "PromptSegment",
    "VideoOptions",
    "check_config",
    "check_texts",
    "config_of",
    "dump_yaml",
    "load_config",
    "output_root",
    "read_edit",
]
