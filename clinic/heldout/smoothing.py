"""A classifier of wine with label smoothing, dropout and a one-cycle rate: its loss cannot reach zero."""

import argparse

import torch
from sklearn.datasets import load_wine
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

wine = load_wine()
x = torch.tensor(wine.data, dtype=torch.float32)
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(wine.target)
model = nn.Sequential(
    nn.Linear(13, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Dropout(0.4), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 3)
)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=24, shuffle=True, drop_last=True)
epochs = 80
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * len(loader))
criterion = nn.CrossEntropyLoss(label_smoothing=0.2)
for epoch in range(epochs):
    model.train()
    for inputs, labels in loader:
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if epoch % 10 == 9:
        model.eval()
        with torch.inference_mode():
            print(
                epoch + 1, f"loss {criterion(model(x), y):.4f} accuracy {(model(x).argmax(1) == y).float().mean():.3f}"
            )
