"""What a user gave the models that they cannot use; base of this room's named errors."""


class ModelInputError(ValueError):
    """Bad configuration, weights or prompt: the message names the value and the way out."""
