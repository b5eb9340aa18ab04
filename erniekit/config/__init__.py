"""The configuration: a YAML file with overrides becomes a checked, frozen, flat object. Nothing here imports Paddle."""

from erniekit.config.load import environment_variables, load
from erniekit.config.schema import Config
from erniekit.config.support import require_supported, unsupported

__all__ = ["Config", "environment_variables", "load", "require_supported", "unsupported"]
