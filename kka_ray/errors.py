"""The errors that a user can mend. The command line prints them without a traceback and exits with status 2."""

from __future__ import annotations


class KkaError(Exception):
    """What was wrong, where, and what to do about it, in the message."""


class ConfigError(KkaError):
    """A configuration that cannot be run."""


class DataError(KkaError):
    """Images or captions that cannot be used."""


class AssetError(KkaError):
    """A model that is missing or is not what it should be."""


class ResourceError(KkaError):
    """The cluster, the disk or the memory lacks what the run needs."""


class NotFreeError(ResourceError):
    """Places on the cluster that were waited for in vain."""


class StageError(KkaError):
    """A stage of the run that cannot go on."""


class StoreError(KkaError):
    """A store that cannot be read or written."""
