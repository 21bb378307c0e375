"""Measuring models: the loss of both directions on the same text."""
