"""What fastdiff raises at its public edge. All are ValueErrors, so callers need no new import to catch them."""


class FastdiffError(ValueError):
    """A mistake in what the caller gave: the message says what was given, what is allowed and what to do."""


class PlanError(FastdiffError):
    """A table of weights that is malformed or does not keep the mean or spread it declares."""


class CheckpointError(FastdiffError):
    """A checkpoint that is missing, truncated, tampered with, unsafe or of an unknown layout."""


class NonFiniteError(FastdiffError):
    """The network returned NaN or infinity during sampling."""
