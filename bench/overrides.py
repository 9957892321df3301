"""Settings that a model type needs and that no rule can know, each with its reason."""

from small_config import Node

START: dict[str, Node] = {
    "autoformer": {"prediction_length": 8},  # has no default
    "informer": {"prediction_length": 8},  # has no default
    "time_series_transformer": {"prediction_length": 8},  # has no default
}
