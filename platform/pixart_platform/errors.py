"""Errors a user can mend. Each message names the place, the value and the way out."""


class PixartError(Exception):
    """Base of all: the command line prints the message alone and exits with code 2."""


class RecipeError(PixartError):
    """A recipe that cannot be run as written."""


class StorageError(PixartError):
    """A folder that cannot be read or written."""


class ManifestError(PixartError):
    """A missing, unreadable or contradicted manifest."""


class RegistryError(PixartError):
    """An unknown model, version or alias."""


class TrackingError(PixartError):
    """A tracking server or database that does not answer."""


class TrainingError(PixartError):
    """Training that stopped itself: a non-finite loss, an order too small for its batch."""
