"""What a run is: pydantic models and YAML loading. Imports neither torch nor ray."""

from kka_ray.config.loading import config_hash, dump, load, merge, parse, read
from kka_ray.config.models import RunConfig

__all__ = ["RunConfig", "config_hash", "dump", "load", "merge", "parse", "read"]
