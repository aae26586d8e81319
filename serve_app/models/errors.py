"""Why no model can be loaded from a name."""


class ModelNotFoundError(Exception):
    """No weights behind a model's name; the message names the ways out."""


class WeightsError(ModelNotFoundError):
    """The weights behind a name are damaged or not those of the model; the message names what is wrong with them."""
