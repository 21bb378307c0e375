"""The quickstart's picture: training and validation loss of both twins over the iterations."""

from __future__ import annotations

from pathlib import Path

from megatron_ledom.direction import Direction
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars

COLOURS = {Direction.REVERSE: "#c0392b", Direction.FORWARD: "#2c5f8a"}


def draw_losses(folder: Path, path: Path, layout_change: int, unigram_loss: float) -> None:
    """Draw the curves of `folder/reverse` and `folder/forward` and save them as a PNG.

    Args:
        folder: holds the two run directories.
        path: the PNG.
        layout_change: the iteration after which both runs went on at another layout.
        unigram_loss: of a unigram model on held-out text, nats a token.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    for direction, colour in COLOURS.items():
        train = read_scalars(folder / direction, TRAIN_LOSS)
        validation = read_scalars(folder / direction, VALIDATION_LOSS)
        axes.plot(list(train), list(train.values()), color=colour, linewidth=1.2, label=f"{direction}, training")
        steps, losses = list(validation), list(validation.values())
        axes.plot(steps, losses, "o--", color=colour, markersize=5, linewidth=0.8, label=f"{direction}, validation")
    axes.axhline(unigram_loss, color="0.45", linestyle=":", linewidth=1.2, label="unigram, held-out text")
    axes.axvline(layout_change, color="0.8", linewidth=1, zorder=0)
    for text, side, offset in (("TP=2 x PP=2", "right", -4), ("DP=2", "left", 4)):
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(text, (layout_change, 1), xytext=(offset, -12), ha=side, fontsize=8, color="0.35", **place)
    axes.set(xlabel="iteration", ylabel="loss, nats per token", title="A tiny reverse model and its forward twin")
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
