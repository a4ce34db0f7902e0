"""LARS and LAMB of pytorch_optimizer take the steps of their papers, with the arguments that our pages give."""

import pytest
import torch

pytorch_optimizer = pytest.importorskip(
    "pytorch_optimizer", reason="pytorch_optimizer is not installed: unstuck[studies]"
)


def test_the_first_step_of_lars_is_its_trust_ratio_times_the_gradient():
    w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    before = w.detach().clone()
    optimizer = pytorch_optimizer.LARS([w], lr=1.0, momentum=0.9, weight_decay=0.1, trust_coefficient=1e-3)
    w.grad = torch.tensor([[0.0, 2.0]])
    optimizer.step()
    trust = 1e-3 * 5 / (2 + 0.1 * 5)  # You, Gitman and Ginsburg (2017), eq. 6
    expected = before - trust * (torch.tensor([[0.0, 2.0]]) + 0.1 * before)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("debias", "ratios"), [(True, [1, 1, 1, 1]), (False, [10, 5.26, 3.69, 2.91])])
def test_lamb_is_its_paper_with_adam_debias_and_up_to_ten_times_as_far_without(debias, ratios):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    options = {"adam_debias": True} if debias else {}
    optimizer = pytorch_optimizer.Lamb([w], lr=0.01, **options)
    m = v = torch.zeros_like(w)
    for t, ratio in enumerate(ratios, start=1):
        g = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        before = w.detach().clone()
        w.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)  # You et al. (2020), algorithm 2
        expected = -0.01 * before.norm() / adam.norm() * adam
        # the paper puts ε beside √v̂, the package beside √v
        torch.testing.assert_close(w.detach() - before, ratio * expected, rtol=2e-3, atol=1e-6)
