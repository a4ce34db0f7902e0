"""A small network learns to read digits, or fails to, for a reason that you choose.

    unstuck demo --list          the reasons
    unstuck demo dead-units      watch it fail, and be told why

An ordinary training script: it knows nothing of unstuck. Every `if fault == ...` stands where a user makes that error.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

FAULTS = {
    "lr-diverges": "The learning rate is so large that the loss explodes.",
    "lr-bounces": "The learning rate is too large: every step jumps over the valley, and the loss stays high.",
    "lr-too-small": "The learning rate is a thousand times too small: the loss hardly moves.",
    "saddle": "The weights start so close to zero that the network sits on a saddle.",
    "zero-init": "All weights start at zero, so all units are the same and none can learn.",
    "dead-units": "The bias of the ReLU units is so low that they give zero for every input.",
    "zero-grad-missing": "The gradients of all past steps pile up: nobody calls optimizer.zero_grad().",
    "parameters-not-optimised": "A layer is replaced after the optimiser was built: its weights never move.",
    "graph-cut": "A .detach() in the forward pass cuts the first layer off from the gradient.",
    "non-finite-data": "One training image holds a NaN.",
}


class Network(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)
        if fault == "saddle":
            nn.init.normal_(self.hidden.weight, std=1e-10)
            nn.init.normal_(self.output.weight, std=1e-10)
            nn.init.zeros_(self.hidden.bias)
            nn.init.zeros_(self.output.bias)
        if fault == "zero-init":
            for weights in self.parameters():
                nn.init.zeros_(weights)
        if fault == "dead-units":
            nn.init.constant_(self.hidden.bias, -20.0)

    def forward(self, images):
        features = F.tanh(self.hidden(images)) if self.fault == "lr-bounces" else F.relu(self.hidden(images))
        if self.fault == "graph-cut":
            features = features.detach()
        return self.output(features)


def digits(fault):
    """Images of eight by eight pixels with their labels: 1400 to learn from, 397 held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("the demo learns scikit-learn's digits, which is not installed: pip install 'unstuck[studies]'")
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    shuffled = torch.randperm(len(images))
    images, labels = images[shuffled].float(), labels[shuffled]
    images = (images - images[:1400].mean(0)) / (images[:1400].std(0) + 1)  # + 1: some pixels are always blank
    if fault == "non-finite-data":
        images[7, 3] = float("nan")
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def choose_optimizer(network, fault):
    if fault == "lr-bounces":
        return torch.optim.Adam(network.parameters(), lr=0.3)
    lr = {"lr-diverges": 10.0, "lr-too-small": 2e-4, "saddle": 0.05}.get(fault, 0.2)
    return torch.optim.SGD(network.parameters(), lr=lr)


def main(fault="healthy"):
    if fault not in ("healthy", *FAULTS):
        sys.exit(f"no fault is called {fault!r}: choose healthy or one of {', '.join(FAULTS)}")
    torch.manual_seed(0)
    images, labels, unseen_images, unseen_labels = digits(fault)
    network = Network(fault)
    optimizer = choose_optimizer(network, fault)
    if fault == "parameters-not-optimised":
        network.hidden = nn.Linear(64, 32)

    for epoch in range(1, 21):
        total = 0.0
        for batch in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            if fault != "zero-grad-missing":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch:2d}   loss {total / len(images):.4f}")

    with torch.no_grad():
        right = network(unseen_images).argmax(1) == unseen_labels
    print(f"reads {right.float().mean():.1%} of the digits it has not seen")


if __name__ == "__main__":
    main(*sys.argv[1:])
