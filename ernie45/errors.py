"""The errors that this library raises on bad input."""


class ErnieError(ValueError):
    """Bad input. The message names what was found, where, what was expected and what to do."""


class ConfigError(ErnieError):
    """A config.json that cannot describe a model."""


class CheckpointError(ErnieError):
    """A checkpoint folder that cannot be read, or a destination that cannot be written."""


class TokenizerError(ErnieError):
    """Tokenizer files that are missing, broken or contradict each other."""
