"""Whole training programs as people write them. Each gives back everything that training moves.

`train(pause)` calls `pause(step)` between its steps; the watched run diagnoses there, the unwatched one does nothing.
"""

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 130
PAUSE = 124  # late enough for every trial: those need 120 recorded steps


class Tied(nn.Module):
    """A transformer whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.blocks(self.tokens(ids)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.GRU(3, 8, num_layers=2, dropout=0.2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])


def _all(model, optimizer, *more):
    return [model.state_dict(), optimizer.state_dict(), *more]


def _classifier(model, make_optimizer, x, *, parts=1, clip=None):
    def train(pause):
        y = torch.randint(0, 4, (len(x),))
        optimizer = make_optimizer(model)
        log = []
        for step in range(1, STEPS + 1):
            model.train()
            batch = torch.randperm(len(x))[:8]
            optimizer.zero_grad()
            for part in batch.chunk(parts):
                loss = F.cross_entropy(model(x[part]), y[part]) / parts
                loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            log.append(loss.item())
            if step == PAUSE:
                model.eval()
                with torch.no_grad():
                    log.append(F.cross_entropy(model(x), y).item())
                pause(step)
        return _all(model, optimizer, log)

    return train


def _mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def _by(make_optimizer, **options):
    return lambda: _classifier(_mlp(), make_optimizer, torch.randn(40, 6), **options)


def cnn_with_batch_norm():
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(36, 4))
    return _classifier(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), torch.randn(40, 1, 8, 8))


def gru():
    return _classifier(Recurrent(), lambda m: torch.optim.Adam(m.parameters(), lr=0.01), torch.randn(40, 5, 3))


def transformer():
    model, ids = Tied(), torch.randint(0, 11, (40, 7))

    def train(pause):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        log = []
        for step in range(1, STEPS + 1):
            batch = ids[torch.randperm(40)[:8]]
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, 11), batch[:, 1:].reshape(-1))
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            if step == PAUSE:
                model.eval()
                with torch.no_grad():  # torch takes another path here, unless a mode listens
                    log.append(model(ids).sum().item())
                model.train()
                pause(step)
        return _all(model, optimizer, log)

    return train


def frozen_parameters():
    model = _mlp()
    model[0].requires_grad_(False)
    return _classifier(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), torch.randn(40, 6))


def raw_tensors():
    x, y = torch.randn(20, 2), torch.randint(0, 2, (20,)) * 2.0 - 1
    w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((2, 5), (5, 1)))

    def train(pause):
        optimizer = torch.optim.SGD([w1, w2], lr=0.1)
        for step in range(1, STEPS + 1):
            scores = ((x @ w1).tanh() @ w2).squeeze(1)
            losses = [(1 + -yi * si).relu() for yi, si in zip(y, scores, strict=True)]
            loss = sum(losses) / len(losses) + 1e-4 * sum((p * p).sum() for p in (w1, w2))
            w1.grad = w2.grad = None
            loss.backward()
            optimizer.step()
            if step == PAUSE:
                pause(step)
        return [w1, w2, optimizer.state_dict()]

    return train


def by_hand_without_an_optimiser():
    x, w = torch.randn(20, 3), torch.randn(3, requires_grad=True)

    def train(pause):
        for step in range(1, STEPS + 1):
            loss = ((x @ w - 1) ** 2).mean()
            loss.backward()
            w.data -= 0.05 * w.grad
            w.grad.zero_()
            if step == PAUSE:
                pause(step)
        return [w]

    return train


def closure():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(30, 3)

    def train(pause):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = (model(x) - x.prod(1, keepdim=True)).square().mean()
            value.backward()
            return value

        for step in range(1, STEPS + 1):
            optimizer.step(loss)
            if step == PAUSE:
                pause(step)
        return _all(model, optimizer)

    return train


def two_optimisers_and_a_schedule():
    net, rival = _mlp(), nn.Linear(4, 6)

    def train(pause):
        first = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.01))
        second = torch.optim.SGD(rival.parameters(), lr=0.05, nesterov=True, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(second, 0.1, total_steps=STEPS // 2 + 1)
        for step in range(1, STEPS // 2 + 1):
            x = torch.randn(8, 6)
            first.zero_grad()
            (rival(net(x)) - x).square().mean().backward()
            first.step()
            second.zero_grad()
            (rival(net(x).detach()) - x).abs().mean().backward()
            second.step()
            schedule.step()
            if step == PAUSE // 2:
                pause(step)
        return [*_all(net, first), *_all(rival, second), schedule.state_dict()]

    return train


def a_device_block_around_each_step():
    model = _mlp()

    def train(pause):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(1, STEPS + 1):
            with torch.device("cpu"):
                model(torch.randn(8, 6)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if step == PAUSE:
                pause(step)
        return _all(model, optimizer)

    return train


def steps_inside_backward():
    model = nn.Linear(6, 4)

    def train(pause):
        optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

        def step_of(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step_of)
        for step in range(1, STEPS // 2 + 1):
            model(torch.randn(8, 6)).square().mean().backward()
            if step == PAUSE // 2:
                pause(step)
        return [model.state_dict(), *(o.state_dict() for o in optimizers.values())]

    return train


def parameters_added_later():
    trunk, head = nn.Linear(6, 4), nn.Linear(4, 4)

    def train(pause):
        optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
        trunk.requires_grad_(False)
        for step in range(1, STEPS + 1):
            if step == 60:
                trunk.requires_grad_(True)
                optimizer.add_param_group({"params": trunk.parameters(), "lr": 0.001})
                pause(step - 1)
            optimizer.zero_grad()
            head(trunk(torch.randn(8, 6))).square().mean().backward()
            optimizer.step()
            if step == PAUSE:
                pause(step)
        return [trunk.state_dict(), *_all(head, optimizer)]

    return train


PROGRAMS = {
    "mlp with dropout": _by(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    "momentum": _by(lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "adam": _by(lambda m: torch.optim.Adam(m.parameters(), lr=0.01)),
    "adamw": _by(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True)),
    "rmsprop": _by(lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01)),
    "a rate far too large": _by(lambda m: torch.optim.SGD(m.parameters(), lr=1e4)),
    "a rate at which it bounces": _by(lambda m: torch.optim.Adam(m.parameters(), lr=1.0)),
    "gradient accumulation": _by(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), parts=4),
    "clipping": _by(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), clip=0.1),
} | {
    f.__name__.replace("_", " "): f
    for f in (
        cnn_with_batch_norm,
        gru,
        transformer,
        frozen_parameters,
        raw_tensors,
        by_hand_without_an_optimiser,
        closure,
        two_optimisers_and_a_schedule,
        a_device_block_around_each_step,
        steps_inside_backward,
        parameters_added_later,
    )
}
