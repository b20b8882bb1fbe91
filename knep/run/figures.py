"""What TensorBoard shows at the end of a run, from one evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from knep.engine.evaluate import Evaluation, Mistake
from knep.engine.logging.tensorboard import WHOLE, Board, session
from knep.utils.text import shortened


def _figure(width: float, height: float) -> Any:
    # The object-oriented interface: no global state, no display, safe beside a user's own pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def confusion_figure(confusion_KK: Tensor, names: Sequence[str]) -> Any:
    """Counts per true class (rows) and predicted class (columns), coloured by share of the row."""
    k, names = len(names), [shortened(name) for name in names]
    figure = _figure(2.5 + 0.45 * k, 2 + 0.45 * k)
    axes = figure.add_subplot()
    share = confusion_KK / confusion_KK.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(k), yticks=range(k))
    axes.set_xticklabels(names, rotation=60, ha="right", parse_math=False)
    axes.set_yticklabels(names, parse_math=False)
    for i in range(k if k <= 30 else 0):
        for j in range(k):
            colour = "white" if share[i, j] > 0.5 else "black"
            if confusion_KK[i, j]:
                axes.text(j, i, str(int(confusion_KK[i, j])), ha="center", va="center", color=colour, fontsize=8)
    return figure


def mistakes_figure(mistakes: Sequence[Mistake], names: Sequence[str]) -> Any:
    """The most confident mistakes: image, true class, predicted class with its probability."""
    columns = 4
    rows = max(1, -(-len(mistakes) // columns))
    figure = _figure(2.6 * columns, 2.8 * rows)
    axes = figure.add_subplot()  # one for all images: an axes each would take most of the time of the drawing
    for i, m in enumerate(mistakes):
        x, y = i % columns, -(i // columns)
        seen = m.image_CHW if len(m.image_CHW) in (1, 3, 4) else m.image_CHW[:1]  # no colours: the first channel
        image = seen.permute(1, 2, 0).squeeze(-1)
        shade = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 and image.dtype == torch.uint8 else {}
        axes.imshow(image, extent=(x + 0.1, x + 0.9, y + 0.02, y + 0.82), interpolation="nearest", **shade)
        title = f"true: {shortened(names[m.true])}\npredicted: {shortened(names[m.predicted])} ({m.probability:.0%})"
        axes.text(x + 0.5, y + 0.84, title, ha="center", va="bottom", fontsize=9, parse_math=False)
    axes.set(xlim=(0, columns), ylim=(1 - rows, 1.04), aspect="equal")
    axes.axis("off")
    return figure


def show(
    board: Board,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    lines: Sequence[str],
    result: Evaluation,
    names: Sequence[str],
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """Writes figures, config, hyper-parameters and the final metrics.

    choices: group -> option; lines: the override lines; step: optimizer steps of the run.
    """
    writer = board.experiment
    writer.add_figure(f"{WHOLE}/test/confusion", confusion_figure(result.confusion_KK, names), step)
    writer.add_figure(f"{WHOLE}/test/most_confident_mistakes", mistakes_figure(result.mistakes, names), step)
    # TensorBoard takes text for Markdown, which takes HTML for HTML.
    text = escape(OmegaConf.to_yaml(OmegaConf.create(dict(config))), quote=False)
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)
    board.log_end(metrics, step, curves=not config["test_flip"])
    board.log_session(session(config, choices, lines), step)
    board.finalize("success")
