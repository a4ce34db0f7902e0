"""An LSTM language model over words with truncated backpropagation through time: the state is carried and detached."""

import argparse
import inspect
import random
import re
import string

import torch
from torch import nn

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--epochs", type=int, default=8)
opt = p.parse_args()
torch.manual_seed(opt.seed)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary, size=48):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.encoder = nn.Embedding(vocabulary, size)
        self.rnn = nn.LSTM(size, size, num_layers=2, dropout=0.1)
        self.decoder = nn.Linear(size, vocabulary)
        self.decoder.weight = self.encoder.weight  # tied

    def forward(self, ids, hidden):
        out, hidden = self.rnn(self.drop(self.encoder(ids)), hidden)
        return torch.log_softmax(self.decoder(self.drop(out)), dim=-1), hidden


def repackage(h):
    return h.detach() if isinstance(h, torch.Tensor) else tuple(repackage(v) for v in h)


words = re.findall(r"\w+|[^\w\s]", inspect.getsource(random) + inspect.getsource(string))[:6000]
vocabulary = {w: k for k, w in enumerate(sorted(set(words)))}
ids = torch.tensor([vocabulary[w] for w in words])
batch, bptt = 10, 20
columns = ids[: len(ids) // batch * batch].view(batch, -1).t().contiguous()

model = LanguageModel(len(vocabulary))
criterion = nn.NLLLoss()
optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
for epoch in range(opt.epochs):
    hidden, total = None, 0.0
    starts = range(0, len(columns) - bptt - 1, bptt)
    for i in starts:
        if hidden is not None:
            hidden = repackage(hidden)
        model.zero_grad()
        output, hidden = model(columns[i : i + bptt], hidden)
        loss = criterion(output.flatten(0, 1), columns[i + 1 : i + 1 + bptt].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch} perplexity {torch.tensor(total / len(starts)).exp():.1f}")
