"""Regression on scikit-learn's diabetes data: a small network, Nesterov momentum, weight decay, a step schedule."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

ap = argparse.ArgumentParser(description=__doc__)
ap.add_argument("--fault", default="")
ap.add_argument("--seed", type=int, default=0)
a = ap.parse_args()
torch.manual_seed(a.seed)

X, y = load_diabetes(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=0)
scaler, yscaler = StandardScaler().fit(X), StandardScaler().fit(y[:, None])
X, X_test = torch.tensor(scaler.transform(X)).float(), torch.tensor(X_test).float()
if a.fault != "preprocessing-mismatch":
    X_test = torch.tensor(scaler.transform(X_test)).float()
y, y_test = (torch.tensor(yscaler.transform(v[:, None])).float().squeeze(1) for v in (y, y_test))
if a.fault == "overfitting":
    X, y = X[:60], y[:60]
if a.fault == "label-noise":
    wrong = torch.rand(len(y)) < 0.3
    y[wrong] += 4 * torch.randn(int(wrong.sum()))
if a.fault == "non-finite-data":
    X[17, 2] = torch.nan

width = 400 if a.fault == "overfitting" else 24
net = torch.nn.Sequential(torch.nn.Linear(10, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
if a.fault in ("saddle", "zero-init"):
    for w in net.parameters():
        torch.nn.init.normal_(w, std=1e-8 if a.fault == "saddle" else 0.0)
if a.fault == "dead-units":
    torch.nn.init.constant_(net[0].bias, -15.0)
lr = {"lr-diverges": 3.0, "lr-bounces": 0.12, "lr-too-small": 1e-6, "saddle": 1e-3, "overfitting": 0.02}.get(
    a.fault, 0.005
)
sgd = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
if a.fault == "parameters-not-optimised":
    net[0] = torch.nn.Linear(10, 24)
schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=40, gamma=0.5)
for epoch in range(100):
    for rows in torch.randperm(len(X)).split(32):
        if a.fault != "zero-grad-missing":
            sgd.zero_grad()
        hidden = net[1](net[0](X[rows]))
        if a.fault == "graph-cut":
            hidden = torch.tensor(hidden.tolist())
        loss = F.mse_loss(net[2](hidden).squeeze(1), y[rows])
        loss.backward()
        sgd.step()
    if not a.fault.startswith("lr-"):
        schedule.step()
    if epoch % 10 == 9:
        with torch.no_grad():
            print(
                epoch + 1, f"train {F.mse_loss(net(X)[:, 0], y):.4f} test {F.mse_loss(net(X_test)[:, 0], y_test):.4f}"
            )
