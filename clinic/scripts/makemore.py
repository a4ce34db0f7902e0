"""In the manner of makemore.py: one file, several models, AdamW, a TensorDataset and an endless DataLoader."""

import argparse
import builtins
import keyword
import math
import time

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch.utils.data.dataloader import DataLoader


class RNNCell(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.xh_to_h = nn.Linear(2 * size, size)

    def forward(self, xt, hprev):
        return F.tanh(self.xh_to_h(torch.cat([xt, hprev], dim=1)))


class RNN(nn.Module):
    """The start state is a parameter, and the loop over time is Python's."""

    def __init__(self, vocab_size, size=48):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, size))
        self.wte = nn.Embedding(vocab_size, size)
        self.cell = RNNCell(size)
        self.lm_head = nn.Linear(size, vocab_size)

    def forward(self, idx, targets=None):
        b, t = idx.size()
        emb = self.wte(idx)
        hprev = self.start.expand((b, -1))
        hiddens = []
        for i in range(t):
            hprev = self.cell(emb[:, i, :], hprev)
            hiddens.append(hprev)
        logits = self.lm_head(torch.stack(hiddens, 1))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class Bigram(nn.Module):
    """A neural bigram is just a lookup table of logits for the next character given the previous one."""

    def __init__(self, vocab_size):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros((vocab_size, vocab_size)))

    def forward(self, idx, targets=None):
        logits = self.logits[idx]
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class CharDataset(Dataset):
    def __init__(self, words, chars, max_word_length):
        self.words = words
        self.max_word_length = max_word_length
        self.stoi = {ch: i + 1 for i, ch in enumerate(chars)}

    def __len__(self):
        return len(self.words)

    def __getitem__(self, idx):
        ix = torch.tensor([self.stoi[w] for w in self.words[idx]], dtype=torch.long)
        x = torch.zeros(self.max_word_length + 1, dtype=torch.long)
        y = torch.zeros(self.max_word_length + 1, dtype=torch.long)
        x[1 : 1 + len(ix)] = ix
        y[: len(ix)] = ix
        y[len(ix) + 1 :] = -1  # index -1 will mask the loss at the inactive locations
        return x, y


class InfiniteDataLoader:
    """this is really hacky and I'm not proud of it, but there doesn't seem to be a better way in PyTorch"""

    def __init__(self, dataset, **kwargs):
        train_sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=int(1e10))
        self.train_loader = DataLoader(dataset, sampler=train_sampler, **kwargs)
        self.data_iter = iter(self.train_loader)

    def next(self):
        try:
            batch = next(self.data_iter)
        except StopIteration:  # this will technically only happen after 1e10 samples... (i.e. basically never)
            self.data_iter = iter(self.train_loader)
            batch = next(self.data_iter)
        return batch


@torch.inference_mode()
def evaluate(model, dataset, batch_size=50, max_batches=None):
    model.eval()
    loader = DataLoader(dataset, shuffle=True, batch_size=batch_size, num_workers=0)
    losses = []
    for i, (X, Y) in enumerate(loader):
        _, loss = model(X, Y)
        losses.append(loss.item())
        if max_batches is not None and i >= max_batches:
            break
    model.train()
    return torch.tensor(losses).mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make More")
    parser.add_argument("--steps", "-n", type=int, default=400)
    parser.add_argument("--type", default="rnn", choices=("rnn", "bigram"))
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--spawn", action="store_true")
    parser.add_argument("--learning-rate", "-l", type=float, default=5e-3)
    parser.add_argument("--weight-decay", "-w", type=float, default=0.01)
    parser.add_argument("--save")
    args = parser.parse_args()
    print(vars(args) | {"save": None})
    torch.manual_seed(3407)

    words = [w for w in [*dir(builtins), *dir(math), *keyword.kwlist] if w.isalpha()]
    chars = sorted(set("".join(words)))
    max_word_length = max(map(len, words))
    rp = torch.randperm(len(words)).tolist()
    train_dataset = CharDataset([words[i] for i in rp[:-30]], chars, max_word_length)
    test_dataset = CharDataset([words[i] for i in rp[-30:]], chars, max_word_length)
    vocab_size = len(chars) + 1
    model = RNN(vocab_size) if args.type == "rnn" else Bigram(vocab_size)
    print(f"model #params: {sum(p.numel() for p in model.parameters())}")

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.99), eps=1e-8
    )
    context = ("spawn" if args.spawn else "fork") if args.num_workers else None
    batch_loader = InfiniteDataLoader(
        train_dataset, batch_size=32, num_workers=args.num_workers, multiprocessing_context=context
    )
    best_loss = None
    step = 0
    while True:
        t0 = time.time()
        X, Y = batch_loader.next()
        _, loss = model(X, Y)
        model.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        t1 = time.time()
        if step % 20 == 0:
            print(f"step {step} | loss {loss.item():.4f}")
            print(f"time {(t1 - t0) * 1000:.2f}ms")
        if step > 0 and step % 100 == 0:
            train_loss = evaluate(model, train_dataset, batch_size=100, max_batches=10)
            test_loss = evaluate(model, test_dataset, batch_size=100, max_batches=10)
            print(f"step {step} train loss: {train_loss} test loss: {test_loss}")
            if best_loss is None or test_loss < best_loss:
                best_loss = test_loss
        step += 1
        if step >= args.steps:
            break
    if args.save:
        torch.save(model.state_dict(), args.save)
