"""Ways to train that go beyond a loop over one network: wrappers, precisions, several losses, gradients made by hand.

As in training_programs.py, each gives back everything that training moves, and calls `pause(step)` between its steps.
"""

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

STEPS = 24


def moved(model, optimizer, *more):
    """Weights, buffers, gradients and the optimiser's state."""
    return [model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict(), *more]


def mlp(into=6, out=4):
    return nn.Sequential(nn.Linear(into, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, out))


def batch(rows=8):
    return torch.randn(rows, 6), torch.randint(0, 4, (rows,))


def looped(step_of, pause):
    """The losses of all steps; `step_of(x, y)` takes one."""
    log = []
    for step in range(1, STEPS + 1):
        log.append(step_of(*batch()).item())
        if step == STEPS // 2:
            pause(step)
    return log


def autocast_and_a_scaler(pause):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7)

    def step(x, y):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return moved(model, optimizer, scaler.state_dict(), looped(step, pause))


def a_scaler_that_skips_steps(pause):
    """Overflows make the scaler leave steps out."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)

    def step(x, y):
        optimizer.zero_grad()
        loss = 8 * F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return moved(model, optimizer, scaler.state_dict(), looped(step, pause))


def bfloat16_weights(pause):
    model = mlp().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        optimizer.step()
        return loss

    return moved(model, optimizer, looped(step, pause))


def workers_of_a_loader(pause):
    """Two processes load, each with chances of its own."""
    model, log = mlp(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 4, (40,)))
    for epoch in range(3):
        for x, y in DataLoader(data, batch_size=10, shuffle=True, num_workers=2, worker_init_fn=np.random.seed):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            log.append(loss.item())
        if epoch == 1:
            pause(epoch)
    return moved(model, optimizer, log)


def distributed_data_parallel(pause):
    with tempfile.TemporaryDirectory() as folder:
        where = (Path(folder) / "meet").as_uri()
        excepthook = sys.excepthook  # torch puts its own in place, for good
        torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(mlp())
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

            def step(x, y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                return loss

            return moved(model, optimizer, looped(step, pause))
        finally:
            torch.distributed.destroy_process_group()
            sys.excepthook = excepthook


class Judged(nn.Module):
    """A model that gives its loss with its answer, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def a_model_that_returns_its_loss_trained_by_a_class(pause):
    class Trainer:
        def __init__(self, model):
            self.model, self.log = model, []
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=2)

        def step(self, x, y):
            loss = self.model(x, labels=y)["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step(loss.item())
            return loss

    trainer = Trainer(Judged())
    log = looped(trainer.step, pause)
    return moved(trainer.model, trainer.optimizer, trainer.schedule.state_dict(), log)


def losses_summed_from_parts(pause):
    """Two heads, a penalty, two backward passes through one graph, and chances of all three generators."""
    trunk, heads = mlp(out=8), nn.ModuleList((nn.Linear(8, 4), nn.Linear(8, 1)))
    model = nn.ModuleList((trunk, heads))
    groups = [{"params": trunk.parameters(), "lr": 0.02}, {"params": heads.parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.5)

    def step(x, y):
        optimizer.zero_grad()
        inner = trunk(x * random.uniform(0.9, 1.1) + float(np.random.normal()) * 0.01)
        parts = {"class": F.cross_entropy(heads[0](inner), y), "size": heads[1](inner).square().mean()}
        loss = sum(parts.values()) + 1e-3 * sum(p.abs().sum() for p in model.parameters())
        loss.backward(retain_graph=True)
        (0.1 * inner.square().mean()).backward()
        optimizer.step()
        return loss

    return moved(model, optimizer, looped(step, pause))


def a_penalty_on_the_gradient(pause):
    """A gradient inside the loss: two networks, two optimisers, as in a Wasserstein GAN."""
    forger, judge = (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)),
        nn.Sequential(nn.Linear(6, 8), nn.SiLU()),
    )
    judge.append(nn.Linear(8, 1))
    first = torch.optim.Adam(forger.parameters(), lr=1e-3, betas=(0.0, 0.9))
    second = torch.optim.RMSprop(judge.parameters(), lr=1e-3)

    def step(x, y):
        forged = forger(torch.randn(len(x), 3))
        between = torch.lerp(x, forged.detach(), torch.rand(len(x), 1)).requires_grad_()
        (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
        second.zero_grad()
        loss = judge(forged.detach()).mean() - judge(x).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
        loss.backward()
        second.step()
        first.zero_grad()
        (-judge(forged).mean()).backward()
        first.step()
        return loss

    return [*moved(forger, first), *moved(judge, second), looped(step, pause)]


def an_average_of_the_weights(pause):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    held = batch(20)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        with torch.inference_mode():
            average.eval()
            return loss.detach() + 0 * F.cross_entropy(average(held[0]), held[1])

    return moved(model, optimizer, average.state_dict(), looped(step, pause))


def sparse_gradients(pause):
    table, head = nn.Embedding(30, 6, sparse=True), nn.Linear(6, 4)
    first, second = torch.optim.SparseAdam(table.parameters(), lr=0.01), torch.optim.Adagrad(head.parameters(), lr=0.1)

    def step(_, y):
        first.zero_grad()
        second.zero_grad()
        loss = F.cross_entropy(head(table(torch.randint(0, 30, (8, 5))).mean(1)), y)
        loss.backward()
        first.step()
        second.step()
        return loss

    log = looped(step, pause)
    return [table.state_dict(), table.weight.grad.to_dense(), first.state_dict(), *moved(head, second, log)]


def complex_parameters(pause):
    """A filter in the frequencies."""
    model = nn.Linear(6, 4)
    taps = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    optimizer = torch.optim.Adam([*model.parameters(), taps], lr=0.01)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.fft.irfft(torch.fft.rfft(x) * taps, n=6)), y)
        loss.backward()
        optimizer.step()
        return loss

    log = looped(step, pause)
    return [torch.view_as_real(taps.detach()), torch.view_as_real(taps.grad), model.state_dict(), log]


def gradients_of_each_sample(pause):
    """Clipped one by one, with noise, and put into .grad by hand: no backward() is called."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(weights, x, y):
        return F.cross_entropy(functional_call(model, weights, (x.unsqueeze(0),)), y.unsqueeze(0))

    def step(x, y):
        weights = {k: v.detach() for k, v in model.named_parameters()}
        each = vmap(grad(loss_of), in_dims=(None, 0, 0))(weights, x, y)
        sizes = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        for name, p in model.named_parameters():
            shares = (1 / sizes.clamp(min=1)).view(-1, *[1] * p.dim())
            p.grad = (each[name] * shares).mean(0) + 0.01 * torch.randn_like(p)
        optimizer.step()
        return vmap(loss_of, in_dims=(None, 0, 0))(weights, x, y).mean()

    return moved(model, optimizer, looped(step, pause))


def recomputed_activations(pause):
    """Checkpoints draw the dropout again in the backward pass; a parametrisation writes its buffers in the forward."""
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 16))
    model = nn.Sequential(first, mlp(into=16))
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(checkpoint(model[1], model[0](x).relu(), use_reentrant=False), y)
        loss.backward()
        optimizer.step()
        return loss

    return moved(model, optimizer, looped(step, pause))


def hooks_of_the_script(pause):
    """Gradients and activations that the script's own hooks change."""

    def halve(gradient):
        gradient.mul_(0.5)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken = [
        model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01)),
        model[1].register_forward_hook(lambda _, __, out: out + 0.01 * torch.randn_like(out)),
        model[3].register_full_backward_hook(lambda _, g, __: (2 * g[0],)),
        optimizer.register_step_pre_hook(lambda *_: halve(model[3].bias.grad)),
    ]

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    log = looped(step, pause)
    for handle in taken:
        handle.remove()
    return moved(model, optimizer, log)


def closures_with_line_search_on_two_models(pause):
    one, two = nn.Linear(6, 5), nn.Linear(5, 4)
    optimizer = torch.optim.LBFGS([*one.parameters(), *two.parameters()], max_iter=3, line_search_fn="strong_wolfe")

    def step(x, y):
        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(two(one(x).tanh()), y)
            value.backward()
            return value

        return optimizer.step(loss).detach()

    return [*moved(one, optimizer), two.state_dict(), looped(step, pause)]


STYLES = {
    f.__name__.replace("_", " "): f
    for f in (
        autocast_and_a_scaler,
        a_scaler_that_skips_steps,
        bfloat16_weights,
        workers_of_a_loader,
        distributed_data_parallel,
        a_model_that_returns_its_loss_trained_by_a_class,
        losses_summed_from_parts,
        a_penalty_on_the_gradient,
        an_average_of_the_weights,
        sparse_gradients,
        complex_parameters,
        gradients_of_each_sample,
        recomputed_activations,
        hooks_of_the_script,
        closures_with_line_search_on_two_models,
    )
}
