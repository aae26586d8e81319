"""Why no model can be loaded from a name."""

from serve_app.errors import RequestError


class ModelNotFoundError(RequestError):
    """No weights behind a model's name; the message names the ways out."""

    status, code, param = 404, "model_not_found", "model_id"


class WeightsError(ModelNotFoundError):
    """The weights behind a name are damaged or not those of the model; the message names what is wrong with them."""

    status, code = 500, "weights_unusable"


class ConfigError(ModelNotFoundError):
    """The configuration behind a name cannot be read; the message says why."""

    status, code = 400, "config_unusable"
