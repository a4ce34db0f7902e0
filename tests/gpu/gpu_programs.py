"""Training programs as people write them for a GPU. Each, made for a device, gives a step and what training moves."""

import torch
from torch import nn
from torch.nn import functional as F


def _classes(device, *shape, n=256):
    return torch.randn(n, *shape, device=device), torch.randint(0, 4, (n,), device=device)


def _mlp(device, *, drop=0.2):
    layers = (nn.Linear(20, 64), nn.ReLU(), nn.Dropout(drop), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return nn.Sequential(*layers).to(device)


def _rows(x, k):
    start = 32 * k % len(x)
    return x[start : start + 32]


def classifier(make_model, make_optimizer, *shape):
    """A plain loop over rows of data that lie on the device."""

    def make(device):
        model, (x, y) = make_model(device), _classes(device, *shape)
        optimizer = make_optimizer(model.parameters())

        def step(k):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(_rows(x, k)), _rows(y, k))
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step, (model, optimizer)

    return make


def _cnn(device):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 4)).to(device)


class Recurrent(nn.Module):
    def __init__(self, layers=1, dropout=0.0):
        super().__init__()
        self.net = nn.LSTM(6, 24, num_layers=layers, dropout=dropout, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])


class Block(nn.Module):
    """Attention as nanoGPT has it, and a feed-forward network."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.attend(self.first(x)).split(width, dim=2)
        q, k, v = (p.view(rows, length, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed(self.second(x))


class GPT(nn.Module):
    def __init__(self, vocabulary, length, width, depth, heads, dropout=0.0):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets):
        places = torch.arange(ids.shape[1], device=ids.device)
        logits = self.head(self.norm(self.blocks(self.tokens(ids) + self.places(places))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(device, *, dropout=0.0, dtype=None, **options):
    model = GPT(17, 16, 32, 2, 2, dropout).to(device)
    ids = torch.randint(0, 17, (64, 17), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **options)

    def step(k):
        batch = ids[8 * k % 64 : 8 * k % 64 + 8]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, (model, optimizer)


def transformer(device):
    return gpt(device, dropout=0.1)


def bfloat16(device):
    return gpt(device, dtype=torch.bfloat16, fused=True)


def float16_with_a_scaler(device):
    model, (x, y) = _mlp(device), _classes(device, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)

    def step(k):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = F.cross_entropy(model(_rows(x, k)), _rows(y, k))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step, (model, optimizer, scaler)


def clipping_and_accumulation(device):
    model, (x, y) = _mlp(device), _classes(device, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True)

    def step(k):
        optimizer.zero_grad()
        for rows in _rows(torch.arange(len(x), device=device), k).chunk(2):
            loss = F.cross_entropy(model(x[rows]), y[rows]) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=True)
        optimizer.step()
        return loss.detach()

    return step, (model, optimizer)


def data_on_the_cpu(device):
    model, (x, y) = _mlp(device), _classes("cpu", 20)
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(k):
        inputs, labels = (_rows(t, k).to(device, non_blocking=True) for t in (x, y))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, (model, optimizer)


def two_optimisers(device):
    """A GAN: the backward pass of the one adds to the gradients that the other has left."""
    maker, judge = nn.Linear(8, 20).to(device), nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    first = torch.optim.Adam(judge.parameters(), lr=1e-3)
    second = torch.optim.Adam(maker.parameters(), lr=1e-3)
    real, one, zero = torch.randn(32, 20, device=device), *(torch.full((32, 1), v, device=device) for v in (1.0, 0.0))

    def step(k):
        first.zero_grad()
        fake = maker(torch.randn(32, 8, device=device))
        loss = F.binary_cross_entropy_with_logits(judge(real), one)
        loss = loss + F.binary_cross_entropy_with_logits(judge(fake.detach()), zero)
        loss.backward()
        first.step()
        second.zero_grad()
        F.binary_cross_entropy_with_logits(judge(fake), one).backward()
        second.step()
        return loss.detach()

    return step, (maker, judge, first, second)


def embedding_on_the_cpu(device):
    table, model = nn.Embedding(50, 20), _mlp(device, drop=0.0)
    optimizer = torch.optim.Adam([*table.parameters(), *model.parameters()], lr=1e-2, foreach=False)
    ids, y = torch.randint(0, 50, (256,)), torch.randint(0, 4, (256,), device=device)

    def step(k):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(table(_rows(ids, k)).to(device)), _rows(y, k))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, (table, model, optimizer)


def _rate_on_the_device(parameters):
    parameters = list(parameters)
    if parameters[0].device.type != "cuda":
        return torch.optim.Adam(parameters, lr=torch.tensor(1e-2))
    return torch.optim.Adam(parameters, lr=torch.tensor(1e-2, device=parameters[0].device), capturable=True)


PROGRAMS = {
    "mlp with dropout": classifier(_mlp, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 20),
    "cnn with batch norm": classifier(_cnn, lambda p: torch.optim.Adam(p, lr=1e-2), 3, 16, 16),
    "lstm": classifier(lambda d: Recurrent().to(d), lambda p: torch.optim.Adam(p, lr=1e-2), 9, 6),
    "transformer": transformer,
    "bfloat16": bfloat16,
    "float16 with a scaler": float16_with_a_scaler,
    "fused": classifier(_mlp, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), 20),
    "foreach": classifier(_mlp, lambda p: torch.optim.RMSprop(p, lr=1e-3, foreach=True), 20),
    "capturable, with its rate on the device": classifier(_mlp, _rate_on_the_device, 20),
    "clipping and accumulation": clipping_and_accumulation,
    "data on the cpu": data_on_the_cpu,
    "two optimisers": two_optimisers,
    "embedding on the cpu": embedding_on_the_cpu,
}
