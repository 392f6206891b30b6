"""What can be wrong with a model that is asked for. One tree, so that a caller catches ``ModelError``."""


class ModelError(Exception):
    """A model could not be found, read or served."""


class ModelNotFound(ModelError):
    """No folder and no Hub repository of this name, or it holds no config.json."""


class UnsupportedModel(ModelError):
    """The model exists, but its architecture, a feature of it or its quantization is not served."""


class BadCheckpoint(ModelError):
    """The checkpoint's files contradict each other, its config, or the safetensors format."""
