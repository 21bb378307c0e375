"""A run directory as one page: what happened, how the loss went, where the time was spent."""
