"""A matrix of trainings and predictions through nnU-Net's own commands, and the page that is made of its results."""


class StudyError(ValueError):
    """A study, its data or its results cannot be used; the message names what was found and what was expected."""
