"""Measuring a model on a split: what is averaged, and over which views."""

import pytest
import torch
from torch import nn

from knep.engine.evaluate import Mistake, evaluate
from knep.run.figures import mistakes_figure


def test_mirrored_averages_the_probabilities_of_an_image_and_its_mirror():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(30, 1, 3, 4), torch.randint(0, 3, (30,))
    plain, mirrored = (evaluate([net], [(x, y)], 3, mirrored=m) for m in (False, True))
    p_NK = ((net(x).softmax(1) + net(x.flip(3)).softmax(1)) / 2).detach()
    assert mirrored.loss == pytest.approx(-p_NK[torch.arange(30), y].log().mean().item(), rel=1e-5)
    assert mirrored.acc == pytest.approx((p_NK.argmax(1) == y).float().mean().item())
    assert plain.loss != mirrored.loss


def test_images_that_are_their_own_mirror_have_the_same_predictions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    half, y = torch.randn(30, 1, 3, 2), torch.randint(0, 3, (30,))
    batches = [(torch.cat([half, half.flip(3)], 3), y)]
    assert evaluate([net], batches, 3).loss == pytest.approx(evaluate([net], batches, 3, mirrored=True).loss)


def test_a_mistake_without_colours_is_drawn_by_its_first_channel():
    image = torch.rand(5, 4, 6)
    drawn = mistakes_figure([Mistake(image, 0, 1, 0.9)], ["ant", "bee"]).axes[0].images[0]
    assert torch.equal(torch.as_tensor(drawn.get_array()), image[0])


def test_a_mistake_in_standardised_colours_is_drawn_whole(caplog):
    image = 3 * torch.randn(3, 4, 6)
    drawn = mistakes_figure([Mistake(image, 0, 1, 0.9)], ["ant", "bee"])
    shown = torch.as_tensor(drawn.axes[0].images[0].get_array())
    drawn.canvas.draw()
    assert "Clipping" not in caplog.text
    assert (float(shown.min()), float(shown.max())) == (0, 1)
    torch.testing.assert_close(shown * (image.max() - image.min()) + image.min(), image.permute(1, 2, 0))


def test_a_loss_beyond_the_smallest_probability_is_the_loss():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
        net[1].bias.zero_()
    x, y = torch.tensor([[[[3.0, 0.0]]], [[[0.0, 5.0]]]]), torch.tensor([1, 0])
    for members, mirrored in (([net], False), ([net, net], True)):
        seen = [x, x.flip(3)] if mirrored else [x]
        logits = torch.stack([net(view) for view in seen])
        p = logits.double().softmax(2).mean(0)[torch.arange(2), y]
        assert evaluate(members, [(x, y)], 2, mirrored=mirrored).loss == pytest.approx(-p.log().mean().item())
