"""Training steps as people write them. Each function builds one from scratch: its leaves and the step itself.

A step takes the function that it calls instead of `loss.backward()`; everything else is ordinary.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _data(n=16, features=6, classes=4):
    return torch.randn(n, features), torch.randint(0, classes, (n,))


def _classify(model, x, y):
    def step(backward):
        backward(F.cross_entropy(model(x), y))

    return list(model.parameters()), step


def mlp_with_batch_norm_and_dropout():
    x, y = _data()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
    return _classify(model, x, y)


def batch_norm_trained_then_evaluated():
    x, _ = _data()
    norm, layer = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def step(backward):
        first = norm(layer(x))
        norm.eval()  # the second call reads what the first wrote into the statistics
        second = norm(layer(x))
        norm.train()
        backward((first * second).mean())

    return [*norm.parameters(), *layer.parameters()], step


def _recurrent(kind):
    def make():
        x, y = torch.randn(5, 7, 3), torch.randint(0, 4, (5,))
        net, head = kind(3, 6, num_layers=2, dropout=0.2, batch_first=True), nn.Linear(6, 4)

        def step(backward):
            out, _ = net(x)
            backward(F.cross_entropy(head(out[:, -1]), y))

        return [*net.parameters(), *head.parameters()], step

    return make


def packed_sequences():
    x, lengths = torch.randn(4, 6, 3), torch.tensor([6, 4, 3, 1])
    net = nn.LSTM(3, 5, batch_first=True)

    def step(backward):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, (h, _) = net(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        backward((out**2).mean() + h.mean())

    return list(net.parameters()), step


def cnn():
    x, y = torch.randn(6, 1, 8, 8), torch.randint(0, 4, (6,))
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.2))
    return _classify(nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 4)), x, y)


class _Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _GPT(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16), nn.Embedding(8, 16)
        self.blocks = nn.ModuleList([_Block(16, 2), _Block(16, 2)]).train(dropout)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _gpt(dropout):
    def make():
        text = torch.randint(0, 11, (200,))
        model = _GPT(dropout)

        def step(backward):
            starts = torch.randint(0, 190, (4,))
            x = torch.stack([text[i : i + 8] for i in starts.tolist()])
            y = torch.stack([text[i + 1 : i + 9] for i in starts.tolist()])
            logits = model(x)
            backward(F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)))

        return list(model.parameters()), step

    return make


def transformer_encoder_layer():
    x, y = torch.randn(3, 5, 8), torch.randint(0, 4, (3,))
    layer, head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)

    def step(backward):
        backward(F.cross_entropy(head(layer(x).mean(1)), y))

    return [*layer.parameters(), *head.parameters()], step


def multihead_attention_with_mask():
    x, attention = torch.randn(5, 3, 8), nn.MultiheadAttention(8, 2, dropout=0.1)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)

    def step(backward):
        out, weights = attention(x, x, x, attn_mask=mask)
        backward(out.pow(2).mean() + weights.var())

    return list(attention.parameters()), step


def frozen_parameters():
    x, y = _data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad], _classify(model, x, y)[1]


def a_frozen_parameter_that_the_optimiser_owns():
    x, y = _data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    return _classify(model, x, y)


def accumulation_with_logging():
    x, y = _data(32)
    model, log = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), []

    def step(backward):
        hits = 0
        for xb, yb in zip(x.chunk(4), y.chunk(4), strict=True):
            logits = model(xb)
            loss = F.cross_entropy(logits, yb) / 4
            log.append(loss.item())
            hits += (logits.argmax(1) == yb).sum().item()
            backward(loss)
            log.append(f"{loss:.3f} {loss.item()}")

    return list(model.parameters()), step


def inplace_everywhere():
    x, _ = _data()
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)

    def step(backward):
        h = F.relu(a(x), inplace=True) + 0
        h += x
        h[x > 0.5] = 0.1
        h[:, 0] *= 2
        h.sub_(b(h.clone()).sigmoid_())
        h[h > 0.3] = h.mean()
        row = h[1]
        row.zero_()
        h[2].add_(b.bias)
        total = torch.zeros(())
        total += (h**2).mean()
        backward(total)

    return [*a.parameters(), *b.parameters()], step


def rows_written_into_a_buffer():
    x, cell = torch.randn(5, 4, 3), nn.RNNCell(3, 6)

    def step(backward):
        out, last = torch.zeros(5, 4, 6), torch.zeros(4, 6)
        for t in range(5):
            last = cell(x[t], last)
            out[t] = last
        backward(out.pow(2).mean() + out[-1].sum() / 10)

    return list(cell.parameters()), step


def a_buffer_written_and_scaled_in_place():
    x, layer = torch.randn(4, 3), nn.Linear(3, 3)

    def step(backward):
        buffer = x.clone()
        buffer[:2] = layer(x)[2:]
        buffer.mul_(0.5)
        backward(buffer.pow(2).mean())

    return list(layer.parameters()), step


def a_view_of_a_buffer_written_and_the_buffer_read():
    x, layer = torch.randn(4, 3), nn.Linear(3, 3)

    def step(backward):
        buffer = torch.ones(3, 4, 3)
        before = buffer.sum()
        flat = buffer.view(-1)
        buffer[0].copy_(layer(x))
        buffer[1][:, 1:] += layer(x)[:, 1:]
        middle = flat[:20].clone().pow(2).sum()
        flat[-1] = layer.bias[0]
        backward(buffer.mean() * before + middle)

    return list(layer.parameters()), step


def statistics_by_hand():
    x, layer = torch.randn(8, 3), nn.Linear(3, 3)
    running = torch.zeros(3)

    def step(backward):
        for part in x.chunk(2):
            h = layer(part)
            with torch.no_grad():
                running.mul_(0.9).add_(h.mean(0), alpha=0.1)
            backward(((h - running) ** 2).mean())
            running.data.mul_(0.5)

    return list(layer.parameters()), step


def codebook_moved_through_data():
    x, layer = torch.randn(8, 3), nn.Linear(3, 3)
    book = torch.randn(5, 3)

    def step(backward):
        h = layer(x)
        nearest = torch.cdist(h, book).argmin(1)
        quantised = book[nearest]
        loss = F.mse_loss(h, quantised)
        straight = h + (quantised - h).detach()
        book.data.mul_(0.9).index_add_(0, nearest, 0.1 * h.detach())
        backward(loss + straight.pow(2).mean())

    return list(layer.parameters()), step


def targets_without_gradients():
    x, net, target = torch.randn(8, 3), nn.Linear(3, 4), nn.Linear(3, 4)
    action, reward = torch.randint(0, 4, (8, 1)), torch.randn(8)

    def step(backward):
        with torch.no_grad():
            best = net(x + 1).argmax(1, keepdim=True)
            goal = reward + 0.9 * target(x + 1).gather(1, best).squeeze(1)
        value = net(x).gather(1, action).squeeze(1)
        loss = F.smooth_l1_loss(value, goal)
        values, places = net(x).topk(2)
        backward(loss + (values.detach() * net(x).log_softmax(1).gather(1, places)).mean())

    return [*net.parameters(), *target.parameters()], step


def an_evaluation_between_the_steps():
    x, y = _data()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 4))

    def step(backward):
        model.eval()
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == y).float().mean().item()
        with torch.inference_mode():
            accuracy += F.cross_entropy(model(x), y).item()
        model.train()
        norm = sum(p.norm() for p in model.parameters())
        loss = F.cross_entropy(model(x), y) + 1e-3 * norm
        accuracy += (model(x).argmax(1) == y).float().mean().item()
        backward(loss)

    return list(model.parameters()), step


def autocast_bfloat16():
    x, y = _data()
    a, b = nn.Linear(6, 6), nn.Linear(6, 4)

    def step(backward):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.tanh(a(torch.tanh(a(a(x)))))
            logits = b(h)
            with torch.autocast("cpu", enabled=False):
                loss = F.cross_entropy(logits.float(), y)
        backward(loss)

    return [*a.parameters(), *b.parameters()], step


def raw_tensors():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(9, 2), torch.randint(0, 2, (9,)) * 2.0 - 1
    w1, w2 = (torch.randn(s, generator=g, requires_grad=True) for s in ((2, 5), (5, 1)))
    bias = torch.zeros(5, requires_grad=True)

    def step(backward):
        scores = ((x @ w1 + bias).tanh() @ w2).squeeze(1)
        losses = [(1 + -yi * si).relu() for yi, si in zip(y, scores, strict=True)]
        data_loss = sum(losses) * (1.0 / len(losses))
        backward(data_loss + 1e-4 * sum((p * p).sum() for p in (w1, w2)))

    return [w1, w2, bias], step


def several_losses_and_backward_calls():
    x, a, b = torch.randn(8, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def step(backward):
        h = a(x)
        backward(h.pow(2).mean(), retain_graph=True)
        backward((b(h) - x).abs().mean() + h.exp().mean().log())
        backward(b(x.flip(0)).square().sum().reshape(1))

    return [*a.parameters(), *b.parameters()], step


def a_batch_drawn_and_augmented_inside():
    x, y = torch.randn(40, 1, 6, 6), torch.randint(0, 4, (40,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))

    def step(backward):
        order = torch.randperm(40)
        batch, labels = x[order[:8]].clone(), y[order[:8]]
        if torch.rand(()) < 0.9:
            batch = batch.flip(-1)
        batch += 0.1 * torch.randn_like(batch)
        mix = torch.rand(8, 1, 1, 1)
        batch = mix * batch + (1 - mix) * batch.roll(1, 0)
        logits = model(batch)
        backward(F.cross_entropy(logits + 0.01 * torch.randn_like(logits), labels, label_smoothing=0.1))

    return list(model.parameters()), step


def _embedding(sparse):
    def make():
        ids, y = torch.randint(0, 10, (6, 3)), torch.randint(0, 4, (6,))
        table, head = nn.Embedding(10, 5, sparse=sparse), nn.Linear(5, 4)

        def step(backward):
            backward(F.cross_entropy(head(table(ids).mean(1)), y))

        return [*table.parameters(), *head.parameters()], step

    return make


def einsum_where_cumsum():
    x, w, v = torch.randn(4, 3), nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))

    def step(backward):
        h = torch.einsum("bi,ij->bj", x, w) * v
        h = torch.where(h > 0, h.cumsum(1), torch.tensor(0.5) * h)
        values, at = h.sort(1)
        top = h.max(dim=1)
        low, high = h.aminmax(dim=1)
        norm = torch.linalg.svd(w, full_matrices=False)
        parts = torch.stack([*h.unbind(1)[:2], values[:, 0], top.values, low, high])
        backward(parts.pow(2).mean() + h.gather(1, at[:, :1]).mean() + norm.S.log().sum())

    return [w, v], step


def masks_that_depend_on_the_weights():
    x, layer = torch.randn(12, 3), nn.Linear(3, 1)

    def step(backward):
        h = layer(x).squeeze(1)
        hard = h[h > h.mean()]
        rest = h.masked_select(h <= h.mean())
        backward(hard.square().mean() + rest.exp().mean())

    return list(layer.parameters()), step


def sampled_actions():
    x, policy = torch.randn(10, 3), nn.Linear(3, 4)

    def step(backward):
        actions = torch.distributions.Categorical(logits=policy(x))
        drawn = actions.sample()
        noise = torch.distributions.Normal(policy(x), 1.0).rsample()
        backward(-(actions.log_prob(drawn) * x[:, 0]).mean() + noise.square().mean() - 0.1 * actions.entropy().mean())

    return list(policy.parameters()), step


def weight_norm_and_gradient_checkpoints():
    x, a, b = torch.randn(8, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, 3)

    def step(backward):
        h = torch.utils.checkpoint.checkpoint(lambda z: torch.tanh(a(z)), x, use_reentrant=False)
        backward(b(h).square().mean())

    return [*a.parameters(), *b.parameters()], step


def an_input_that_wants_a_gradient():
    x, a = torch.randn(8, 3, requires_grad=True), nn.Linear(3, 5)

    def step(backward):
        backward(a(x * 2).square().mean())

    return list(a.parameters()), step


def numpy_indices_and_scalars():
    x, a = torch.randn(8, 3), nn.Linear(3, 5)

    def step(backward):
        h = a(x)
        rows = torch.arange(8).numpy()
        picked = h[rows, rows % 5] * (rows.astype("float32").mean())
        q, k = h.chunk(2, dim=1)
        for row in k:
            picked = picked + row.sum()
        picked[range(3)] = q[:3, 0]
        backward(picked.square().mean())

    return list(a.parameters()), step


PROGRAMS = {
    f.__name__: f
    for f in (
        mlp_with_batch_norm_and_dropout,
        batch_norm_trained_then_evaluated,
        packed_sequences,
        cnn,
        transformer_encoder_layer,
        multihead_attention_with_mask,
        frozen_parameters,
        a_frozen_parameter_that_the_optimiser_owns,
        accumulation_with_logging,
        inplace_everywhere,
        rows_written_into_a_buffer,
        a_buffer_written_and_scaled_in_place,
        a_view_of_a_buffer_written_and_the_buffer_read,
        statistics_by_hand,
        codebook_moved_through_data,
        targets_without_gradients,
        an_evaluation_between_the_steps,
        autocast_bfloat16,
        raw_tensors,
        several_losses_and_backward_calls,
        a_batch_drawn_and_augmented_inside,
        einsum_where_cumsum,
        masks_that_depend_on_the_weights,
        sampled_actions,
        weight_norm_and_gradient_checkpoints,
        an_input_that_wants_a_gradient,
        numpy_indices_and_scalars,
    )
} | {
    "gru": _recurrent(nn.GRU),
    "lstm": _recurrent(nn.LSTM),
    "gpt": _gpt(dropout=False),
    "gpt_with_dropout": _gpt(dropout=True),
    "embedding": _embedding(sparse=False),
    "sparse_embedding": _embedding(sparse=True),
}
