"""What TensorBoard shows at the end of a run, from one evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from knep.engine.calibration import calibration_error
from knep.engine.evaluate import Evaluation, Measured, Mistake
from knep.engine.logging.tensorboard import WHOLE, Board, session
from knep.utils.pages import figure
from knep.utils.text import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_figure(confusion_KK: Tensor, names: Sequence[str]) -> Figure:
    """Counts per true class (rows) and predicted class (columns), coloured by share of the row."""
    k, names = len(names), [shortened(name) for name in names]
    drawn = figure(2.5 + 0.45 * k, 2 + 0.45 * k)
    axes = drawn.add_subplot()
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
    return drawn


def reliability_figure(bins: Tensor) -> Figure:
    """The share of right predictions over the confidence of each bin, the diagonal being honest (Guo et al. 2017)."""
    drawn = figure(5, 4.6)
    axes = drawn.add_subplot()
    kept = bins[bins[:, 0] > 0]
    confidence, right = kept[:, 1] / kept[:, 0], kept[:, 2] / kept[:, 0]
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--")
    axes.bar(confidence.tolist(), right.tolist(), width=0.9 / len(bins), color="C0", alpha=0.8)
    for x, y, count in zip(confidence.tolist(), right.tolist(), kept[:, 0].int().tolist(), strict=True):
        axes.text(x, y + 0.01, str(count), ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.08), xlabel="confidence", ylabel="share of right predictions")
    axes.set_title(f"expected calibration error {calibration_error(bins):.2%}", fontsize=10)
    return drawn


def mistakes_figure(mistakes: Sequence[Mistake], names: Sequence[str]) -> Figure:
    """The most confident mistakes: image, true class, predicted class with its probability."""
    columns = 4
    rows = max(1, -(-len(mistakes) // columns))
    drawn = figure(2.6 * columns, 2.8 * rows)
    axes = drawn.add_subplot()  # one for all images: an axes each would take most of the time of the drawing
    for i, m in enumerate(mistakes):
        x, y = i % columns, -(i // columns)
        seen = m.image_CHW if len(m.image_CHW) in (1, 3, 4) else m.image_CHW[:1]  # no colours: the first channel
        image = seen.permute(1, 2, 0).squeeze(-1)
        if image.ndim == 3 and image.dtype != torch.uint8:
            image = _in_unit(image.float())
        shade = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 and image.dtype == torch.uint8 else {}
        axes.imshow(image, extent=(x + 0.1, x + 0.9, y + 0.02, y + 0.82), interpolation="nearest", **shade)
        title = f"true: {shortened(names[m.true])}\npredicted: {shortened(names[m.predicted])} ({m.probability:.0%})"
        axes.text(x + 0.5, y + 0.84, title, ha="center", va="bottom", fontsize=9, parse_math=False)
    axes.set(xlim=(0, columns), ylim=(1 - rows, 1.04), aspect="equal")
    axes.axis("off")
    return drawn


def _in_unit(image: Tensor) -> Tensor:
    """Standardised colours between the image's own ends, 0 and 1, as what is drawn has to be."""
    image = image.nan_to_num(0.0, 0.0, 0.0)
    low, high = image.min(), image.max()
    return image if low >= 0 and high <= 1 else (image - low) / (high - low).clamp_min(1e-12)


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
    writer.add_figure(f"{WHOLE}/test/reliability", reliability_figure(result.bins), step)
    if all(mistake.image_CHW.ndim == 3 for mistake in result.mistakes):  # rows of a table cannot be drawn
        writer.add_figure(f"{WHOLE}/test/most_confident_mistakes", mistakes_figure(result.mistakes, names), step)
    _show_run(board, config, choices, lines, metrics, step)


def show_task(
    board: Board,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    lines: Sequence[str],
    result: Measured,
    member: Any,
    names: Sequence[str],
    metrics: Mapping[str, float],
) -> None:
    """As `show`, for a task other than one class of several. member: the fitted model."""
    if result.predictions.is_floating_point() and result.targets.is_floating_point():
        drawn = scatter_figure(result.predictions, result.targets, names)
        board.experiment.add_figure(f"{WHOLE}/test/predicted_and_true", drawn, member.steps)
    if result.confusion_KK is not None:
        drawn = confusion_figure(result.confusion_KK, names)
        board.experiment.add_figure(f"{WHOLE}/test/confusion", drawn, member.steps)
    _show_run(board, config, choices, lines, metrics, member.steps)


def scatter_figure(predicted: Tensor, true: Tensor, names: Sequence[str]) -> Any:
    """Predicted against true numbers (N,) or (N, T), in their own units: a field for each of the first eight."""
    predicted, true = (t.reshape(len(t), -1) for t in (predicted, true))
    count = min(predicted.shape[1], 8)
    columns = min(count, 4)
    drawn = figure(3.2 * columns, 3.2 * -(-count // columns))
    for k in range(count):
        axes = drawn.add_subplot(-(-count // columns), columns, k + 1)
        axes.scatter(true[:, k], predicted[:, k], s=4)
        ends = [float(true[:, k].min()), float(true[:, k].max())]
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.set(xlabel="true", ylabel="predicted")
        axes.set_title(shortened(names[k]), parse_math=False)
    return drawn


def _show_run(
    board: Board,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    lines: Sequence[str],
    metrics: Mapping[str, float],
    step: int,
) -> None:
    writer = board.experiment
    # TensorBoard takes text for Markdown, which takes HTML for HTML.
    text = escape(OmegaConf.to_yaml(OmegaConf.create(dict(config))), quote=False)
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)
    board.log_end(metrics, step, curves=not config["test_flip"])
    board.log_session(session(config, choices, lines), step)
    board.finalize("success")
