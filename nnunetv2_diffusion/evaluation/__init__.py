"""Metrics of predictions, and their comparison."""


class EvaluationError(ValueError):
    """Files or options cannot be evaluated; the message names what was found and what was expected."""
