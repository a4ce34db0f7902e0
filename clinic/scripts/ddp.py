"""Distributed data parallel in the manner of the torchrun tutorial: a Trainer class, a snapshot written by rank 0.

torchrun --nproc-per-node=2 ddp.py
"""

import argparse
import os

import torch
import torch.nn.functional as F
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class MyTrainDataset(Dataset):
    def __init__(self, size):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(size, 20, generator=g)
        self.data = list(zip(x, x[:, :4].argmax(1), strict=True))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Trainer:
    def __init__(self, model, train_data, optimizer, save):
        self.rank = int(os.environ["RANK"])
        self.model = DDP(model)
        self.train_data = train_data
        self.optimizer = optimizer
        self.save = save

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        output = self.model(source)
        loss = F.cross_entropy(output, targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _run_epoch(self, epoch):
        self.train_data.sampler.set_epoch(epoch)
        losses = [self._run_batch(source, targets) for source, targets in self.train_data]
        if self.rank == 0:
            print(f"Epoch {epoch} | Steps: {len(self.train_data)} | Loss {sum(losses) / len(losses):.4f}", flush=True)

    def train(self, max_epochs):
        for epoch in range(max_epochs):
            self._run_epoch(epoch)
        if self.rank == 0 and self.save:
            torch.save(self.model.module.state_dict(), self.save)


def main(total_epochs, batch_size, save, leave):
    init_process_group(backend="gloo")
    torch.manual_seed(0)
    train_set = MyTrainDataset(2048)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_data = DataLoader(train_set, batch_size=batch_size, shuffle=False, sampler=DistributedSampler(train_set))
    Trainer(model, train_data, optimizer, save).train(total_epochs)
    if not leave:
        destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="simple distributed training job")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", default=32, type=int)
    parser.add_argument("--leave", action="store_true", help="without destroy_process_group(), as many scripts do")
    parser.add_argument("--save")
    args = parser.parse_args()
    main(args.epochs, args.batch_size, args.save, args.leave)
